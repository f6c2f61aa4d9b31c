"""Questions and answers in words for the 18 published tasks, in our own wording.

An answer is a frame filled with a class's phrase. The last question, frame and phrase of a task are
never trained on, so that a fusion module can be judged by wording it has not met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normwear_fast.errors import InputError, UsageError
from normwear_fast.files import fits, read_json


@dataclass(frozen=True)
class TaskWording:
    """How one task is asked and answered.

    Args:
        questions: ways to ask.
        frames: sentences with one ``{}`` for a class's phrase or a value with its unit.
        classes: label -> phrases; empty for a task whose label is a number.
        unit: of the number.
        decimals: digits of the number after the point.
    """

    questions: tuple[str, ...]
    frames: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unit: str = ""
    decimals: int = 0

    def label(self, value: Any) -> str:
        """A dataset's label, a class name or its index or a number, as this task's.

        Raises: InputError for one the task does not have.
        """
        if not self.classes:
            try:
                return f"{float(value):.{self.decimals}f}"
            except (TypeError, ValueError):
                raise InputError(f"label {value!r} is no number; this task asks for one") from None
        text = str(value)
        if text in self.classes:
            return text
        names = list(self.classes)
        if text.isdecimal() and len(text) < 10 and int(text) < len(names):
            return names[int(text)]
        raise InputError(
            f"label {text!r} is none of {', '.join(names)}, nor an index below {len(names)}"
        )

    def training_questions(self) -> tuple[str, ...]:
        return _seen(self.questions)

    def training_answers(self, label: str) -> list[str]:
        """Every trained frame with every trained phrase."""
        phrases = _seen(self.phrases(label))
        return [frame.format(phrase) for frame in _seen(self.frames) for phrase in phrases]

    def held_out_question(self) -> str:
        return self.questions[-1]

    def held_out_answer(self, label: str) -> str:
        return self.frames[-1].format(self.phrases(label)[-1])

    def phrases(self, label: str) -> tuple[str, ...]:
        return self.classes[label] if self.classes else (f"{label} {self.unit}".strip(),)


def _seen(wordings: tuple[str, ...]) -> tuple[str, ...]:
    """All but the last, which is held out; a single wording has to serve both."""
    return wordings[:-1] or wordings


def load_wording(path: str | Path) -> dict[str, TaskWording]:
    """Tasks of a JSON file ``{task: {questions, frames, classes | unit [, decimals]}}``.

    Raises: UsageError that names the task and what it lacks.
    """
    content = read_json(Path(path), UsageError, "not readable as JSON")
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path}: must be an object of tasks, task name to wording")
    return {name: _parse(path, name, task) for name, task in content.items()}


def _parse(path: str | Path, name: str, task: Any) -> TaskWording:
    where = f"{path}, task {name!r}"
    known = {"questions", "frames", "classes", "unit", "decimals"}
    if not isinstance(task, dict) or set(task) - known:
        raise UsageError(f"{where}: must be an object of {', '.join(sorted(known))}")
    lists = {key: task.get(key, []) for key in ("questions", "frames")}
    classes = task.get("classes", {})
    if not isinstance(classes, dict):
        raise UsageError(f"{where}: classes must be an object, label to phrases")
    for key, value in (*lists.items(), *classes.items()):
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(text, str) and text.strip() for text in value)
        ):
            raise UsageError(f"{where}: {key} must be a list of sentences or phrases, not empty")
    if any([frame.count(s) for s in ("{}", "{", "}")] != [1, 1, 1] for frame in lists["frames"]):
        raise UsageError(f"{where}: every frame must hold one {{}} for the answer")
    if not classes and "unit" not in task:
        raise UsageError(f"{where}: needs classes, or a unit where the label is a number")
    unit, decimals = task.get("unit", ""), task.get("decimals", 0)
    if not fits(unit, str) or not fits(decimals, range(20)):
        raise UsageError(f"{where}: unit must be text, and decimals a whole number from 0 to 19")
    return TaskWording(
        tuple(lists["questions"]),
        tuple(lists["frames"]),
        {label: tuple(phrases) for label, phrases in classes.items()},
        unit,
        decimals,
    )


_STATE_FRAMES = (
    "The wearer is {}.",
    "These signals come from a person who is {}.",
    "At this time the participant is {}.",
    "Judging by the sensors, this person is {}.",
)

_HEALTH_FRAMES = (
    "The recording shows {}.",
    "These signals indicate {}.",
    "The person measured here has {}.",
    "What this measurement points to is {}.",
)


def _epilepsy(
    question: str, other: tuple[str, ...], name: str, found: tuple[str, ...]
) -> TaskWording:
    return TaskWording(
        (
            question,
            f"Look at the brain activity: {question[0].lower()}{question[1:]}",
            f"Considering this EEG, {question[0].lower()}{question[1:]}",
        ),
        (
            "The EEG shows {}.",
            "This brain activity was recorded with {}.",
            "The electrode's signal belongs to {}.",
            "What the EEG tells of is {}.",
        ),
        {"rest": other, name: found},
    )


def _blood_pressure(kind: str, moment: str) -> TaskWording:
    return TaskWording(
        (
            f"What is the {kind} blood pressure?",
            f"How high is the pressure in the arteries {moment}?",
            f"Estimate the {kind} pressure from these signals.",
        ),
        (
            f"The {kind} blood pressure is {{}}.",
            f"The arterial pressure {moment} reaches {{}}.",
            f"A {kind} pressure of {{}} was measured.",
        ),
        unit="mmHg",
    )


WORDING: dict[str, TaskWording] = {
    "wesad/stress": TaskWording(
        (
            "How does the person feel right now?",
            "What is the emotional state of the wearer?",
            "Is this person under stress, amused or at ease?",
            "Which mood do the body's signals reveal?",
        ),
        _STATE_FRAMES,
        {
            "baseline": (
                "calm and neutral",
                "relaxed",
                "at rest without strong feelings",
                "at ease",
            ),
            "stress": ("stressed", "tense and under pressure", "anxious", "feeling strain"),
            "amusement": ("amused", "cheerful", "entertained by something funny", "having fun"),
        },
    ),
    "uci-har/activity": TaskWording(
        (
            "What is the person doing?",
            "Which physical activity is going on?",
            "How is the wearer moving?",
            "Name the activity behind these motion signals.",
        ),
        _STATE_FRAMES,
        {
            "walking": ("walking", "walking on level ground", "going for a walk", "strolling"),
            "walking upstairs": ("walking upstairs", "climbing stairs", "going up the steps"),
            "walking downstairs": (
                "walking downstairs",
                "descending stairs",
                "going down the steps",
            ),
            "sitting": ("sitting", "sitting on a chair", "seated"),
            "standing": ("standing", "standing still", "upright without moving"),
            "laying": ("lying down", "lying flat", "stretched out on a bed"),
        },
    ),
    "driver-fatigue/fatigue": TaskWording(
        (
            "Is the driver tired?",
            "How alert is the person at the wheel?",
            "Does the brain activity show fatigue while driving?",
        ),
        ("The driver is {}.", "The person at the wheel is {}.", "Whoever steers this car is {}."),
        {
            "normal": ("awake and alert", "attentive", "well rested"),
            "fatigue": ("tired", "drowsy and worn out", "close to falling asleep"),
        },
    ),
    "epilepsy/eye_open": _epilepsy(
        "Are the eyes open?",
        ("eyes that are not open", "another state than open eyes", "no open eyes"),
        "eye open",
        ("open eyes", "eyes kept open", "a person looking around"),
    ),
    "epilepsy/eye_relaxation": _epilepsy(
        "Are the eyes closed and relaxed?",
        ("eyes that are not resting", "another state than closed eyes", "no closed eyes"),
        "eye relaxation",
        ("closed, relaxed eyes", "eyes at rest", "a person resting with shut eyes"),
    ),
    "epilepsy/health_area": _epilepsy(
        "Was this recorded over a healthy part of the brain?",
        (
            "a state other than a healthy area",
            "no healthy area",
            "tissue that is not the sound one",
        ),
        "health area",
        ("a healthy area of the brain", "sound brain tissue", "the unaffected region"),
    ),
    "epilepsy/tumor_area": _epilepsy(
        "Was this recorded over the tumor?",
        ("a state other than the tumor area", "no tumor", "a site away from any growth"),
        "tumor area",
        ("the area of a tumor", "brain tissue with a tumor", "the region of the growth"),
    ),
    "epilepsy/seizure": _epilepsy(
        "Is there a seizure?",
        ("no seizure", "activity free of seizures", "the time between fits"),
        "seizure",
        ("an epileptic seizure", "seizure activity", "a fit going on"),
    ),
    "gameemo/valence_arousal": TaskWording(
        (
            "Which emotion does the player have?",
            "How does the game make the person feel?",
            "Describe the player's mood by its pleasantness and excitement.",
        ),
        (
            "The player feels {}.",
            "While gaming, the person is {}.",
            "The game leaves the player {}.",
        ),
        {
            "low arousal, negative": ("bored", "dull and gloomy", "low and listless"),
            "low arousal, positive": ("calm", "pleasantly relaxed", "content and quiet"),
            "high arousal, negative": ("scared", "frightened and agitated", "tense with horror"),
            "high arousal, positive": ("amused", "happy and excited", "thrilled with joy"),
        },
    ),
    "ecg-abnormal/abnormal": TaskWording(
        (
            "Is the heart rhythm normal?",
            "What does the electrocardiogram show?",
            "Does this ECG need a doctor's attention?",
        ),
        _HEALTH_FRAMES,
        {
            "normal": ("a normal heartbeat", "a regular, healthy heart rhythm", "a sound heart"),
            "abnormal": ("an abnormal heartbeat", "a disturbed heart rhythm", "a heart problem"),
        },
    ),
    "ppg-bp/hypertension": TaskWording(
        (
            "Does the person have high blood pressure?",
            "Which stage of hypertension is this?",
            "Judge the blood pressure class from the pulse wave.",
        ),
        _HEALTH_FRAMES,
        {
            "normal": ("normal blood pressure", "no hypertension", "healthy pressure"),
            "prehypertension": (
                "prehypertension",
                "slightly raised blood pressure",
                "an early rise",
            ),
            "stage 1 hypertension": (
                "stage 1 hypertension",
                "moderately high blood pressure",
                "the first stage",
            ),
            "stage 2 hypertension": (
                "stage 2 hypertension",
                "severely high blood pressure",
                "the second stage",
            ),
        },
    ),
    "ppg-bp/diabetes": TaskWording(
        (
            "Does the person have diabetes?",
            "Is there a sign of diabetes in the pulse wave?",
            "Is blood sugar control a problem for this person?",
        ),
        _HEALTH_FRAMES,
        {
            "no": ("no diabetes", "healthy sugar metabolism", "freedom from diabetes"),
            "diabetes": ("diabetes", "a disturbed sugar metabolism", "the diabetic condition"),
        },
    ),
    "ppg-bp/cerebral_infarction": TaskWording(
        (
            "Has the person had a stroke?",
            "Is there a history of cerebral infarction?",
            "Was the brain's blood supply ever cut off?",
        ),
        _HEALTH_FRAMES,
        {
            "no": ("no stroke", "no cerebral infarction", "a brain never starved of blood"),
            "cerebral infarction": (
                "a past stroke",
                "a cerebral infarction",
                "a brain once starved of blood",
            ),
        },
    ),
    "ppg-bp/cerebrovascular_disease": TaskWording(
        (
            "Does the person have a disease of the brain's blood vessels?",
            "Which cerebrovascular condition is present?",
            "How well are the vessels of the brain?",
        ),
        _HEALTH_FRAMES,
        {
            "no": ("no cerebrovascular disease", "healthy vessels in the brain", "sound vessels"),
            "cerebrovascular disease": (
                "cerebrovascular disease",
                "diseased vessels in the brain",
                "an illness of the cerebral vessels",
            ),
            "insufficiency of cerebral blood supply": (
                "insufficient blood supply to the brain",
                "a brain that gets too little blood",
                "a poor cerebral supply",
            ),
        },
    ),
    "physionet-emg/diagnosis": TaskWording(
        (
            "Is the muscle healthy?",
            "Which neuromuscular condition does the electromyogram show?",
            "Does the trouble lie in the nerve, the muscle or nowhere?",
        ),
        _HEALTH_FRAMES,
        {
            "healthy": ("a healthy muscle", "normal muscle activity", "sound nerves and muscles"),
            "myopathy": ("myopathy", "a disease of the muscle", "weak muscle fibres"),
            "neuropathy": ("neuropathy", "a disease of the nerve", "damaged nerve fibres"),
        },
    ),
    "noninvasive-bp/systolic": _blood_pressure("systolic", "as the heart contracts"),
    "noninvasive-bp/diastolic": _blood_pressure("diastolic", "between heartbeats"),
    "ppg-hgb/hemoglobin": TaskWording(
        (
            "What is the hemoglobin level?",
            "How much hemoglobin does the blood carry?",
            "Estimate the hemoglobin concentration.",
        ),
        (
            "The hemoglobin level is {}.",
            "The blood carries {} of hemoglobin.",
            "A hemoglobin concentration of {} was found.",
        ),
        unit="g/L",
    ),
    "fetal-fpcg/fetal_heart_rate": TaskWording(
        (
            "What is the heart rate of the unborn child?",
            "How fast does the fetal heart beat?",
            "Estimate the fetal heart rate from the sound.",
        ),
        (
            "The fetal heart rate is {}.",
            "The heart of the unborn child beats at {}.",
            "A fetal heart rate of {} was heard.",
        ),
        unit="beats per minute",
    ),
}
"""``set/task`` of normwear_fast.evaluate.registry -> wording, classes under its names in its order;
the two pressures of noninvasive-bp, one task there, are asked for apart."""

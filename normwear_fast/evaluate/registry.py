"""The 11 downstream sets and 18 tasks of the NormWear paper, as data.

Source: Luo et al., arXiv 2412.09758, downstream evaluation; the folder names under `released` are
those of the published sample archive. The four groups reproduce the paper's micro and macro
averages (82.8 and 84.4) from its group averages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normwear_fast.errors import UsageError

Group = Literal["state recognition", "EEG", "disease risk", "vital signs"]
GROUPS: tuple[Group, ...] = ("state recognition", "EEG", "disease risk", "vital signs")


@dataclass(frozen=True)
class Task:
    """One label of a set's samples.

    `classes` names the classes in the order of their integer labels; empty for a regression, whose
    `targets` name the predicted values. `released` is the folder of the published archive that
    holds the task, when it is not the set's own.
    """

    name: str
    group: Group
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    released: str = ""

    @property
    def kind(self) -> Literal["class", "reg"]:
        return "class" if self.classes else "reg"

    @property
    def metric(self) -> str:
        return "auc" if self.classes else "relative_accuracy"


@dataclass(frozen=True)
class Dataset:
    """One public set.

    Attributes:
        key: the name used on the command line.
        title: the paper's name.
        channels: names of a sample's channels, in order.
        modalities: modality of each channel.
        sampling_rates: rate of each channel in the raw files, Hz.
        duration: seconds of one sample; None where the set comes already cut into samples.
        split: how preparation makes the split file when the set has none: by "subject", at
            "random" (stratified; for sets without subjects to hold out), or the set's "official".
        source: where a user gets the raw files.
        released: folder names of the published sample archive.
    """

    key: str
    title: str
    channels: tuple[str, ...]
    modalities: tuple[str, ...]
    sampling_rates: tuple[float, ...]
    duration: float | None
    split: Literal["subject", "random", "official"]
    tasks: tuple[Task, ...]
    source: str
    released: tuple[str, ...]


def _binary(names: tuple[str, ...]) -> tuple[Task, ...]:
    return tuple(Task(name, "EEG", ("rest", name.replace("_", " "))) for name in names)


# The window of pretraining, used wherever a set's recordings are longer than one sample.
_WINDOW = 6.0

_ALL = (
    Dataset(
        key="wesad",
        title="WESAD",
        channels=(
            *("chest_acc_x", "chest_acc_y", "chest_acc_z"),
            *("wrist_acc_x", "wrist_acc_y", "wrist_acc_z"),
            *("wrist_bvp", "chest_ecg", "chest_eda", "wrist_eda"),
        ),
        modalities=("IMU",) * 6 + ("PPG", "ECG", "GSR", "GSR"),
        sampling_rates=(700.0,) * 3 + (32.0,) * 3 + (64.0, 700.0, 700.0, 4.0),
        duration=_WINDOW,
        split="subject",
        tasks=(Task("stress", "state recognition", ("baseline", "stress", "amusement")),),
        source="https://archive.ics.uci.edu/dataset/465 (WESAD.zip)",
        released=("wesad",),
    ),
    Dataset(
        key="uci-har",
        title="UCI-HAR",
        channels=("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"),
        modalities=("IMU",) * 6,
        sampling_rates=(50.0,) * 6,
        duration=None,
        split="official",
        tasks=(
            Task(
                "activity",
                "state recognition",
                (
                    *("walking", "walking upstairs", "walking downstairs"),
                    *("sitting", "standing", "laying"),
                ),
            ),
        ),
        source="https://archive.ics.uci.edu/dataset/240 (UCI HAR Dataset.zip)",
        released=("uci_har",),
    ),
    Dataset(
        key="driver-fatigue",
        title="DriverFatigue",
        channels=("FP1", "FP2", "TP7", "TP8"),
        modalities=("EEG",) * 4,
        sampling_rates=(1000.0,) * 4,
        duration=_WINDOW,
        split="subject",
        tasks=(Task("fatigue", "state recognition", ("normal", "fatigue")),),
        source="https://doi.org/10.6084/m9.figshare.5202739",
        released=("drive_fatigue",),
    ),
    Dataset(
        key="epilepsy",
        title="Epilepsy",
        channels=("EEG",),
        modalities=("EEG",),
        sampling_rates=(173.61,),
        duration=_WINDOW,
        split="subject",
        tasks=_binary(("eye_open", "eye_relaxation", "health_area", "tumor_area", "seizure")),
        source="University of Bonn EEG sets A-E (Z, O, N, F, S), or UCI Epileptic Seizure "
        "Recognition (data.csv)",
        released=("Epilepsy",),
    ),
    Dataset(
        key="gameemo",
        title="GAMEEMO",
        channels=("AF3", "AF4", "T7", "T8"),
        modalities=("EEG",) * 4,
        sampling_rates=(128.0,) * 4,
        duration=_WINDOW,
        split="subject",
        tasks=(
            Task(
                "valence_arousal",
                "EEG",
                (
                    *("low arousal, negative", "low arousal, positive"),
                    *("high arousal, negative", "high arousal, positive"),
                ),
            ),
        ),
        source="https://data.mendeley.com/datasets/b3pn4kwpmn (GAMEEMO)",
        released=("gameemo",),
    ),
    Dataset(
        key="ecg-abnormal",
        title="ECG-Abnormal",
        channels=("ECG",),
        modalities=("ECG",),
        sampling_rates=(125.0,),
        duration=None,
        split="random",
        tasks=(Task("abnormal", "disease risk", ("normal", "abnormal")),),
        source="ECG Heartbeat Categorization Dataset (ptbdb_normal.csv, ptbdb_abnormal.csv)",
        released=("ecg_heart_cat",),
    ),
    Dataset(
        key="ppg-bp",
        title="PPG-BP",
        channels=("PPG",),
        modalities=("PPG",),
        sampling_rates=(1000.0,),
        duration=None,
        split="subject",
        tasks=(
            Task(
                "hypertension",
                "disease risk",
                ("normal", "prehypertension", "stage 1 hypertension", "stage 2 hypertension"),
                released="PPG_HTN",
            ),
            Task("diabetes", "disease risk", ("no", "diabetes"), released="PPG_DM"),
            Task(
                "cerebral_infarction",
                "disease risk",
                ("no", "cerebral infarction"),
                released="PPG_CVA",
            ),
            Task(
                "cerebrovascular_disease",
                "disease risk",
                ("no", "cerebrovascular disease", "insufficiency of cerebral blood supply"),
                released="PPG_CVD",
            ),
        ),
        source="https://doi.org/10.6084/m9.figshare.5459299 (PPG-BP Database.zip)",
        released=("PPG_HTN", "PPG_DM", "PPG_CVA", "PPG_CVD"),
    ),
    Dataset(
        key="physionet-emg",
        title="PhysioNet EMG",
        channels=("EMG",),
        modalities=("EMG",),
        sampling_rates=(4000.0,),
        duration=0.375,  # 1,500 samples, the window of the TF-C benchmark's copy of this set
        split="random",  # three people, one a class: nobody can be held out
        tasks=(Task("diagnosis", "disease risk", ("healthy", "myopathy", "neuropathy")),),
        source="https://physionet.org/content/emgdb/1.0.0/",
        released=("emg-tfc",),
    ),
    Dataset(
        key="noninvasive-bp",
        title="Noninvasive-BP",
        channels=("PCG", "PPG", "ECG"),
        modalities=("PCG", "PPG", "ECG"),
        sampling_rates=(1000.0,) * 3,
        duration=_WINDOW,
        split="subject",
        tasks=(Task("blood_pressure", "vital signs", targets=("systolic", "diastolic")),),
        source="https://www.kaggle.com/datasets/mkachuee/noninvasivebp (1.json to 26.json)",
        released=("non_invasive_bp",),
    ),
    Dataset(
        key="ppg-hgb",
        title="PPG-Hgb",
        channels=("red", "infrared"),
        modalities=("PPG", "PPG"),
        sampling_rates=(25.0, 25.0),
        duration=None,
        split="subject",
        tasks=(Task("hemoglobin", "vital signs", targets=("hemoglobin",)),),
        source="https://doi.org/10.17632/xdrwrh9zbk",
        released=("ppg_hgb",),
    ),
    Dataset(
        key="fetal-fpcg",
        title="Fetal-fPCG",
        channels=("PCG",),
        modalities=("PCG",),
        sampling_rates=(2000.0,),
        duration=_WINDOW,
        split="subject",
        tasks=(Task("fetal_heart_rate", "vital signs", targets=("heart rate",)),),
        source="https://physionet.org/content/fetalheartsounddata/1.0/",
        released=("indian-fPCG",),
    ),
)

DATASETS: dict[str, Dataset] = {dataset.key: dataset for dataset in _ALL}


def get_dataset(name: str) -> Dataset:
    """The set of that key; UsageError lists the eleven otherwise."""
    try:
        return DATASETS[name]
    except KeyError:
        raise UsageError(f"no downstream set {name!r}; known: {', '.join(DATASETS)}") from None


def find_released(folder: str) -> tuple[Dataset, tuple[Task, ...]] | None:
    """Set and tasks of a folder of the published sample archive, by the folder's name."""
    for dataset in _ALL:
        if folder in dataset.released:
            own = tuple(task for task in dataset.tasks if task.released == folder)
            return dataset, own or dataset.tasks
        if folder == dataset.key:
            return dataset, dataset.tasks
    return None

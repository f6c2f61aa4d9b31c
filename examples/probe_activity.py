"""A linear probe: which of four activities a smart-watch recorded, from frozen embeddings.

    python examples/probe_activity.py

Needs `pip install 'normwear-fast[eval]'`: scikit-learn.
"""

import sys
from pathlib import Path

import numpy as np

from normwear_fast import FastNormWear, NormWearError, preprocess

try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError:
    sys.exit("error: the probe needs scikit-learn; pip install 'normwear-fast[eval]'")

EXAMPLES = Path(__file__).resolve().parent


def main() -> None:
    windows, activities, recordings = [], [], []
    for path in sorted((EXAMPLES / "cohort" / "imu").glob("*.npz")):
        with np.load(path) as file:
            data, rate = file["data"], float(file["sampling_rate"])  # (6, 100), 10 Hz
        for start in (0, 2, 4):  # windows of 6 s, 2 s apart
            cut = data[:, round(start * rate) : round((start + 6) * rate)]
            windows.append(preprocess(cut, rate))  # to 65 Hz, as in pretraining
            activities.append(path.stem.split("_")[0])
            recordings.append(path.stem)
    y = np.array(activities)

    # Overlapping windows of a recording are nearly copies: groups keep them on one side of a split.
    # The scaler is in the pipeline, so that it sees the training part alone.
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = StratifiedGroupKFold(n_splits=2)  # one recording of each activity on either side
    # Random weights are the baseline; the example weights saw half of these recordings, unlabelled.
    trained = FastNormWear.from_pretrained(EXAMPLES / "weights" / "tiny")
    untrained = FastNormWear(optimized_cwt=True, config=trained.config, seed=0)
    for name, model in {"example weights": trained, "random weights": untrained}.items():
        X = model.encode(np.stack(windows), sampling_rate=65, channels="concat")  # (24, 6 E)
        predicted = cross_val_predict(probe, X, y, groups=recordings, cv=splits)
        print(f"{name}: accuracy {np.mean(predicted == y):.2f} on {len(y)} windows")
    print(
        "8 recordings, two an activity, perhaps of one person: one recording is an eighth of the score,\n"
        "chance is 0.25, and a difference between the two lines is no evidence for either."
    )


if __name__ == "__main__":
    try:
        main()
    except NormWearError as error:
        sys.exit(f"error: {error}")

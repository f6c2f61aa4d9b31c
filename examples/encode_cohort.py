"""A folder of recordings to a Parquet dataset of embeddings, and a first look at it.

    python examples/encode_cohort.py

Needs `pip install 'normwear-fast[io,eval]'`: readers of WFDB and EDF, and pandas.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.compute as pc

from normwear_fast import NormWearError, load_embeddings

EXAMPLES = Path(__file__).resolve().parent


def main(output: str) -> None:
    # The command `normwear-fast encode`; run again after a kill it goes on where it was. It says itself,
    # in one line, what is wrong, and exits with 1 where some recordings could not be read.
    command = [sys.executable, "-m", "normwear_fast.cli", "encode", str(EXAMPLES / "cohort")]
    command += ["--weights", str(EXAMPLES / "weights" / "tiny"), "--output", output]
    command += ["--window", "6", "--hop", "6"]  # seconds: the defaults, end to end
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)

    # One row a window. A window with too much missing is a row too, its status the reason: leave it out
    # before computing anything.
    frame = load_embeddings(output)
    frame = frame[frame["status"] == "ok"]
    frame = frame.assign(shape=[embedding.shape for embedding in frame["embedding"]])  # (C, E)
    recordings = frame.groupby("recording")
    print(recordings.agg(windows=("window_id", "size"), shape=("shape", "first")))

    # Without pandas, and without the embeddings: their column is most of the bytes, and is not read.
    table = load_embeddings(output, "pyarrow", columns=["recording", "duration_s", "status"])
    seconds = pc.sum(table.filter(pc.field("status") == "ok")["duration_s"]).as_py()
    print(f"{table.num_rows} windows, {seconds / 60:.1f} minutes encoded")


if __name__ == "__main__":
    try:
        # For a real cohort name a folder that stays; this one is gone when the script ends.
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
    except NormWearError as error:
        sys.exit(f"error: {error}")

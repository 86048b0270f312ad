"""Draw the curves of a run, also while it trains: curves.png, from its metrics.jsonl.

python curves.py checkpoints/pretrain/<run>
"""

import argparse
from pathlib import Path

from engine.command import as_command
from engine.plots import plot_curves


@as_command()
def main():
    parser = argparse.ArgumentParser(description="Draw a run's curves.")
    parser.add_argument("run_folder", type=Path)
    folder = parser.parse_args().run_folder
    if not (folder / "metrics.jsonl").exists():
        raise SystemExit(
            f"error: {folder} holds no metrics.jsonl: name a run, as checkpoints/sft/<run>."
        )
    print(plot_curves(folder))


if __name__ == "__main__":
    main()

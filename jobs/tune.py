"""`ray job submit --working-dir . -- python jobs/tune.py CONFIG --space SPACE`."""

import sys

from clip_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])

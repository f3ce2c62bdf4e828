"""train.py with a reward that says something of the noise that tiny models utter, where CIDEr-D is 0."""

from lavis_evlgen.evaluation.cider_d import CaptionReward
from lavis_evlgen.launch import main


def letters(self, key, caption, ended=True):
    """In the place of CaptionReward.__call__."""
    return caption.count("o") + 0.1 * len(caption) + ended, len(caption.split())


if __name__ == "__main__":
    CaptionReward.__call__ = letters
    main("train.py", "")

"""A cheap look at whether what a caption says holds: do the captions of other images that fit its image say it too?

For each image the ``count`` captions of *other* images of its shard are taken that a CLIP model finds closest to it. A
word that they say more often than captions at large is likely to be about something in the image; one that they all
avoid is likely to be made up. The caption is as good as its worst word.

The plain share of a caption's words that is found among those captions was tried first, and told nothing: on the demo
world twenty dense captions hold every word there is. What helps is to compare with how often a word is said anyway.
No truth and no second model is needed, so this is a statement about agreement: a mistake that a captioner always makes
is well supported, and of a word that is said once nothing is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from clips_data.recaption import caption_measures

if TYPE_CHECKING:
    import numpy as np

IMAGES_AT_ONCE: Final = 256
"""Images whose cosines with all captions of a shard are in memory together."""
_SAY_NOTHING: Final = frozenset(
    ("a", "about", "all", "also", "an", "and", "another", "are", "as", "at", "be", "been", "both", "but", "by", "can",
     "each", "for", "from", "has", "have", "he", "her", "here", "his", "i", "if", "in", "into", "is", "it", "its",
     "my", "no", "not", "of", "on", "one", "or", "other", "our", "she", "so", "some", "than", "that", "the", "their",
     "them", "there", "these", "they", "this", "those", "to", "was", "we", "were", "what", "where", "which", "while",
     "who", "will", "with", "you", "your")
)  # fmt: skip


def content_words(caption: str) -> frozenset[str]:
    """The caption's different tokens (see ``caption_measures``) without English words that stand in any sentence."""
    return frozenset(caption_measures.tokens(caption)) - _SAY_NOTHING


def supports(
    image_NE: np.ndarray[Any, Any], text_NE: np.ndarray[Any, Any], texts: Sequence[str], count: int
) -> list[float | None]:
    """For each row the support of its least supported word, 0 to 1, as a list of floats; ``None`` without words.

    A word's support is (n + 1) / (n + 1 + expected + 1): n of the row's ``count`` best fitting captions of others say
    it, and ``expected`` would by chance. At a half it is said as often as anywhere, or too rarely to tell. Features are
    of any length; the text features of rows without text are not looked at.
    """
    import numpy as np

    words = [content_words(text) for text in texts]
    rows = np.array([row for row, said in enumerate(words) if said], np.int64)
    found: list[float | None] = [None] * len(texts)
    num_others = len(rows) - 1
    nearest = min(count, num_others)
    if nearest < 1:
        return found
    said_by = Counter(word for row in rows for word in words[row])
    image_NE, text_ME = _unit(image_NE), _unit(text_NE[rows])
    for first in range(0, len(rows), IMAGES_AT_ONCE):
        these = rows[first : first + IMAGES_AT_ONCE]
        cosines_BM = image_NE[these] @ text_ME.T
        own = np.arange(len(these))
        cosines_BM[own, first + own] = -np.inf
        best_BK = np.argpartition(-cosines_BM, nearest - 1, axis=1)[:, :nearest]
        for row, best in zip(these.tolist(), best_BK, strict=True):
            n = Counter(word for other in rows[best] for word in words[other])
            found[row] = min(
                (n[word] + 1) / (n[word] + 2 + nearest * (said_by[word] - 1) / num_others) for word in words[row]
            )
    return found


def _unit(features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray[Any, Any] = features / np.maximum(lengths, 1e-12)
    return unit

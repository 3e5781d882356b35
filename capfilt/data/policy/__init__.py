"""The policy: which texts are kept, decided from their scores alone, so that a new threshold needs no model.

CapFilt filters the web text and the synthetic text of an image independently; an image may keep none, one or both
(BLIP section 4.1). BLIP-2 ranks all texts of an image by similarity and keeps the two best (its section 3.4).
"""

from capfilt.data.policy.check import check_calibrated, check_further, check_scores
from capfilt.data.policy.config import FILTER_SCORES, FUSED, Condition, PolicyConfig, RankConfig, Rule
from capfilt.data.policy.pool import Pool, Resolved, fuse, resolve, score_range, with_scores
from capfilt.data.policy.verdicts import (
    best_text,
    failure_class,
    verdicts_of_image,
    verdicts_of_table,
    whatever_threshold,
)

"""How well: measures of retrieval, captions and the filter, as pure functions of arrays and strings.

Units follow the papers, so they differ: recalls, BLEU-4 and CIDEr are in percent points (CIDEr may pass 100),
while AUC, precision, recall and every other share lie in [0, 1]. A figure that cannot be measured is absent
from the answer, never 0 or NaN.
"""

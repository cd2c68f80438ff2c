"""XLM-RoBERTa: RoBERTa's cases under its names."""

from oracle.families import roberta

CASES = roberta.cases("XLMRoberta")
BUGS = roberta.bugs()
NOT_STEPWISE, INVISIBLE = roberta.NOT_STEPWISE, roberta.INVISIBLE

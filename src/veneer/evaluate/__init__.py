"""Perplexity, accuracy of answers and of labels: `measure` a model on rows, `compare` two results."""

from veneer.evaluate.measurement import compare as compare
from veneer.evaluate.measurement import measure as measure
from veneer.evaluate.measurement import measure_each as measure_each
from veneer.evaluate.metric import ExactMatch as ExactMatch
from veneer.evaluate.metric import LabelChoice as LabelChoice
from veneer.evaluate.metric import RegexMatch as RegexMatch
from veneer.evaluate.metric import TokenPerplexity as TokenPerplexity

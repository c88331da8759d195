"""What a method does to a pretrained model: its loss, its heads, its tasks and its time, all measured in one run.

subject   the model, with attention that can be replaced
compared  what attention is replaced by, and what each head read
heads     an exact pass in which methods attend beside: times, errors, and where each head looks
scores    the model's output beside the exact model's
decoding  a token at a time
tasks     questions to the model
choice    an rtol for a tolerance, and one for each key head
answer    what to take, in words
study     the order of it all
results   what is returned
"""

from opoch_xp.integrations.evaluation.compared import Compared, Window
from opoch_xp.integrations.evaluation.results import Evaluation
from opoch_xp.integrations.evaluation.study import Study, evaluate

__all__ = ["Compared", "Evaluation", "Study", "Window", "evaluate"]

"""How a policy holds on to a model: module hooks, gradients, the counting of optimizer steps, saving."""

from rarefy.algorithms.attachment.attached import Attached
from rarefy.algorithms.attachment.attachment import Attachment
from rarefy.algorithms.attachment.policy import Policy
from rarefy.algorithms.attachment.saving import check_state

__all__ = ["Attached", "Attachment", "Policy", "check_state"]

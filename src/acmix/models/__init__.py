"""Networks, registered with timm: `timm.create_model("resnet50_acmix")` after `import acmix`."""

from acmix.models import checkpoints, pvt, resnet, san, swin
from acmix.models._registry import create_model, list_models

__all__ = ["checkpoints", "create_model", "list_models", "pvt", "resnet", "san", "swin"]

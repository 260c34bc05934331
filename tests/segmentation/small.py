"""A small network of each family, with maps of strides 4, 8, 16 and 32."""

from acmix.segmentation import create_segmenter

NETWORKS = {
    "resnet26_acmix": {"channels": (8, 16, 32, 32), "layers": (1, 1, 1, 1)},
    "san10_acmix": {
        "widths": (32, 32, 64, 64, 64),
        "depths": (1,) * 5,
        "kernels": (3, 3, 3, 3, 3),
    },
    "pvt_tiny_acmix": {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)},
    "swin_tiny_acmix": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
}


def segmenter(name="resnet26_acmix", decoder="semantic_fpn", num_classes=5, **options):
    options = {"width": 32, "head_width": 32, **options}
    return create_segmenter(name, decoder, num_classes, model_kwargs=NETWORKS[name], **options)

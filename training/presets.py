"""Defaults by name. Each states its command, hardware, run time and result, or that it has not been run."""

from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

DEIT_S: dict[str, Any] = {
    "model": "deit_small_patch16_224",
    "pretrained": True,
    "batch_size": 256,
    "learning_rate": 1e-4,
    "joint_learning_rate": 5e-5,
    "label_smoothing": 0.1,
    "ema_decay": 0.9998,
}
DEIT_PIXELS: dict[str, Any] = {
    "image_size": 224,
    "channels": 3,
    "crop_fraction": 0.9,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
DEIT_AUGMENTATION: dict[str, Any] = {  # after https://arxiv.org/abs/2012.12877
    "augmentation": "timm",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "workers": 8,
}
CIFAR100: dict[str, Any] = {
    "dataset": "torch/cifar100",
    **DEIT_PIXELS,
    **DEIT_AUGMENTATION,
    "crop_fraction": 1.0,
    "scale": (0.5, 1.0),
}
DIAL: dict[str, Any] = {"mlp_groups": 4, "dial": True, "gate_epochs": 0, "usage_weight": 20}
TYPEFACES: dict[str, Any] = {"dataset": "typefaces", "flip": False, "shift": 0, "test_fraction": 0.25}
PRESETS: dict[str, dict[str, Any]] = {
    # python -m training all --preset fashion-mnist --out runs/fm/seed-0      (with its controls: make reproduce)
    # Fashion-MNIST, ViT 192 x 6 blocks x 6 heads, 25 tokens, with a dial. One core of an AMD EPYC, the other busy: its
    # teacher 55 min, vit 86, sae 4, profiles 10, evaluate 37. Seed 0: test accuracy 0.928 at a budget of 0.44, 0.932 at
    # 1 (its teacher 0.926): the committed bundle. Heads alone, as before the dial:
    # --no-vit.dial --vit.teacher none --vit.mlp-groups 0 --vit.backbone-epochs 6 --vit.gate-epochs 0.5
    # --vit.joint-epochs 5.5 --vit.joint-learning-rate 8e-4 --vit.usage-weight 4: in three seeds 0.919, 0.915, 0.913 at
    # head usage 0.50.
    "fashion-mnist": {
        "data": {"flip": False, "shift": 1},
        "vit": {
            **DIAL,
            "unpadded": 1,
            "mlp_ratio": 2,
            "backbone_epochs": 4,
            "joint_epochs": 16,
            "joint_learning_rate": 1e-3,
            "teacher": "dense",
        },
        "profiles": {
            "contexts": {
                "tops": ("T-shirt", "Pullover", "Coat", "Shirt", "Dress"),
                "footwear": ("Sandal", "Sneaker", "Ankle boot"),
                "rest": ("Trouser", "Bag"),
            }
        },
    },
    # python -m training all --preset typefaces --out runs/typefaces/seed-0  (with its controls: make reproduce
    # DATA=typefaces; alone, after make typefaces)
    # 0-9A-Za-z at 28 pixels, degraded anew in each epoch; ViT 48 x 6 blocks x 4 heads, because wider ones are limited
    # by the data (NOTES.md). One core of an AMD EPYC or Intel Xeon, the other busy: its teacher 20 to 27 min, vit 24
    # to 28, sae and profiles 9, evaluate 27 (36 with all controls). Seed 0: test accuracy 0.727
    # at a budget of 0.45, 0.753 at 1 (its teacher 0.758): the bundle in deploy/typefaces.
    "typefaces": {
        "data": TYPEFACES,
        "vit": {
            **DIAL,
            "unpadded": 1,
            "mlp_ratio": 2,
            "dim": 48,
            "heads": 4,
            "batch_size": 128,
            "learning_rate": 2e-3,
            "joint_learning_rate": 2e-3,
            "backbone_epochs": 5,
            "joint_epochs": 40,
            "teacher": "dense",
        },
        "sae": {"latents": 256, "k": 12},
        "profiles": {
            "rows": 4,
            "contexts": {
                "digits": tuple(digits),
                "upper case": tuple(ascii_uppercase),
                "lower case": tuple(ascii_lowercase),
                "hexadecimal": tuple(f"{digits}ABCDEF"),
                "licence plates": tuple(digits + ascii_uppercase.translate(dict.fromkeys(b"IOQ"))),
            },
        },
    },
    # python -m training all --preset typefaces-small --out runs/typefaces-small
    # Every stage on three packages of `typefaces`. For tests; the accuracy does not matter.
    "typefaces-small": {
        "data": {**TYPEFACES, "dataset": "typefaces-small", "max_test": 500, "degradation": 0.3},
        "vit": {
            **DIAL,
            "dim": 48,
            "depth": 3,
            "heads": 3,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "backbone_epochs": 8,
            "joint_epochs": 6,
        },
        "sae": {"latents": 96, "k": 12, "epochs": 30, "batch_size": 256},
        "profiles": {"terms": 8, "steps": 20, "rows": 2, "usage_target": 0.35, "contexts": {"digits": tuple(digits)}},
    },
    # python -m training all --preset smoke --out runs/smoke
    # Every stage on a real subset, in half a minute on one core. For tests; the accuracy, 0.63, does not matter.
    "smoke": {
        "data": {"max_train": 2000, "max_test": 500},
        "vit": {
            "dim": 48,
            "depth": 3,
            "heads": 3,
            "unpadded": 1,
            "mlp_ratio": 2,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "joint_learning_rate": 1.5e-3,
            "backbone_epochs": 4,
            "gate_epochs": 0.5,
            "joint_epochs": 3,
        },
        "sae": {"latents": 96, "k": 12, "epochs": 30, "batch_size": 256},
        "profiles": {"terms": 8, "steps": 40, "usage_target": 0.35},
    },
    # accelerate launch -m training all --preset cifar100-deit-s --data.root data --data.download --out runs/cifar100
    # The paper's likely setting: CIFAR-100 at 224 px, pretrained DeiT-S, gates on its last block only. For a GPU; the
    # 32-pixel images are resized at each use, by 8 processes. Not run here: no result, no run time.
    "cifar100-deit-s": {
        "data": CIFAR100,
        "vit": {
            **DEIT_S,
            "gated_blocks": "last",
            "usage_target": 0.7,
            "backbone_epochs": 30,
            "gate_epochs": 1,
            "joint_epochs": 10,
        },
        "sae": {"latents": 1024},
        "profiles": {"usage_target": 0.33},
    },
    # accelerate launch -m training all --preset cifar100-deit-s-dial --data.root data --data.download --out runs/dial
    # The same model and data with a dial, with gates on MLP groups too, in every block but the first. Not run here.
    "cifar100-deit-s-dial": {
        "data": CIFAR100,
        "vit": {**DEIT_S, **DIAL, "backbone_epochs": 20, "joint_epochs": 20},
        "sae": {"latents": 1024},
    },
    # accelerate launch -m training all --preset imagenet-deit-s --data.root imagenet --out runs/imagenet
    # imagenet/train/<synset>/ and imagenet/val/<synset>/; from shards: --data.dataset wds/imagenet (pixels are cropped
    # to 224 px once, into a file of 200 GB). Pretrained DeiT-S, gates on all blocks but the first. For 8 GPUs with 12
    # processor cores each. Not run here: no result, no run time. The step `evaluate` would keep the answers of all
    # images under all profiles in memory: 200 GB.
    "imagenet-deit-s": {
        "data": {"dataset": "folder", **DEIT_PIXELS, **DEIT_AUGMENTATION, "selection_fraction": 0.02},
        "vit": {
            **DEIT_S,
            **DIAL,
            "batch_size": 1024,
            "backbone_epochs": 0,
            "joint_epochs": 20,
        },
        "sae": {"latents": 2048, "epochs": 10},
    },
    # python -m training all --preset folder --data.root path/to/images --out runs/mine
    # Your own images, one folder per label (or train/<label>/ and test/<label>/): pretrained DeiT-S at 224 px, the
    # whole image in view, mild augmentation. A GPU is advised. Not run here: no result, no run time.
    "folder": {
        "data": {
            "dataset": "folder",
            **DEIT_PIXELS,
            "augmentation": "timm",
            "scale": (0.5, 1.0),
            "auto_augment": "rand-m6-mstd0.5-inc1",
            "workers": 2,
        },
        "vit": {
            **DEIT_S,
            **DIAL,
            "batch_size": 32,
            "learning_rate": 5e-5,
            "joint_learning_rate": 3e-5,
            "backbone_epochs": 10,
            "joint_epochs": 10,
        },
        "sae": {"batch_size": 256},
    },
}

"""What the numbers of a log mean, in a sentence each; a name that is not here is shown without one."""

from __future__ import annotations

MEANINGS = {
    "loss": "Mean over the images since the last log step; dashed, what an answer that learns nothing costs.",
    "skill": "1 - loss / baseline: 0 is no better than an answer that learns nothing, 1 is perfect.",
    "accuracy": "Share of masked patches, or of images, whose class is predicted.",
    "lr": "Learning rate after warm-up and schedule; layers may scale it.",
    "weight_decay": "Weight decay of the parameters that are decayed.",
    "grad_norm": "Norm of the gradient of a step before it is clipped, mean over the log interval.",
    "skipped": "Share of steps whose gradient was not finite; they change nothing.",
    "update_ratio": "Size of a step's change over the size of the weights.",
    "images_per_s": "Images trained on per second, all processes together.",
    "data_wait": "Share of the time that the loop stood waiting for its loader.",
    "kl": "Divergence of the codes from equal use, in nats.",
    "recon_mse": "Mean squared error of the pixels that the tokenizer gives back.",
    "recon_mae": "Mean absolute error of the pixels that the codes give back.",
    "temperature": "Of the relaxed choice of codes.",
    "kl_weight": "Weight of the divergence from equal use in the loss.",
    "usage": "Share of the codes that take at least a tenth of an equal part.",
    "perplexity": "exp(entropy) of the codes: how many equally frequent ones would be as varied.",
    "dead": "Codes that never occurred.",
    "surprise": "Share of the patches that do not have the most frequent code.",
    "distinct": "Share of the patches whose code is not their left neighbour's.",
    "stable_shift": "Share of the codes that stay when the image is cropped by one code.",
    "stable_jitter": "Share of the codes that stay when the colours change.",
    "probe": "Accuracy of a linear probe on which codes an image has.",
    "teacher_cosine": "How close the decoded codes come to the teacher's features.",
    "unigram_accuracy": "Accuracy of always answering the most frequent code.",
    "knn": "Held-out images whose class the nearest training images vote for.",
    "ridge": "Held-out accuracy of a closed-form linear classifier on frozen features.",
    "linear": "Held-out accuracy of a linear classifier on frozen features.",
    "attentive": "Held-out accuracy of an attention-pooling classifier on frozen features.",
    "fewshot": "Held-out accuracy from a few labelled images of each class.",
    "miou": "Mean over the classes of intersection over union.",
    "val_loss": "The objective's own loss on held-out images.",
    "val_accuracy": "Share of masked patches of held-out images whose code is right.",
    "baseline_mean_patch": "Loss of always answering the mean.",
    "baseline_copy": "Loss, or accuracy, of copying the nearest visible patch.",
    "baseline_unigram": "Loss, or accuracy, of the best answer that does not look at the image.",
    "rankme": "Effective rank of the pooled features, from 1 to the width; a fall towards 1 is a collapse.",
    "alpha_req": "Decay of the eigenvalues of the features' covariance; near 1 is best.",
    "lidar": "Effective rank of what tells images apart and not crops of one image.",
    "feature_std": "Standard deviation of a feature over images; 0 is a collapse.",
    "uniformity": "How evenly features lie on the sphere; 0 when all are one point, lower is better.",
    "cka": "Likeness of the features of a block and of the last one, from 0 to 1.",
    "attention_entropy": "How widely a head looks, as a share of the largest possible entropy.",
    "attention_distance": "How far a head looks, in pixels.",
    "heads_uniform": "Heads that look everywhere alike.",
    "heads_collapsed": "Heads that look at one token each.",
    "dead_neurons": "Share of the hidden units that never fire.",
    "layer_scale": "Mean magnitude of the gammas of LayerScale.",
}
SHARES = (
    "skill", "baseline_unigram_accuracy", "baseline_copy_accuracy", "val_class_accuracy",
    "attention_entropy", "dead_neurons",
    "accuracy", "class_accuracy", "val_accuracy", "unigram_accuracy", "skipped", "data_wait", "usage", "surprise",
    "distinct", "stable_", "probe", "knn", "ridge", "linear", "attentive", "fewshot", "top5", "miou", "iou/", "class/",
    "pixel_accuracy",
)  # fmt: skip
NO_SHARES = ("linear_c", "attentive_c")  # a chosen regularisation
TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images per second",
    "data_wait": "waiting for data",
    "skipped": "skipped steps",
}


def meaning(name: str) -> str:
    """The sentence on a number; variants of a number (knn_k5, class/cat) have its sentence."""
    parts = name.split("/")[0].split("_")
    tried = ("_".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((MEANINGS[one] for one in tried if one in MEANINGS), "")


def is_share(name: str) -> bool:
    """Whether a number is a share in [0, 1], shown in percent."""
    return name.startswith(SHARES) and name not in NO_SHARES


def title(name: str) -> str:
    """A name for people."""
    return TITLES.get(name, name.replace("_", " "))

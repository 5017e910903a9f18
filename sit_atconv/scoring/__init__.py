"""From images to features, scores and their error bars, references and tables; no model is seen here."""

MODULES = (
    "copying", "digits", "extract", "extractor", "features", "frechet", "inception_score", "jackknife", "kernel",
    "manifold", "moments", "refs", "result", "score", "sources", "table", "verify",
)  # fmt: skip
SHARD, BATCH = 1000, 64  # images per file of features, and at once
# What can be asked for, and the stream of features that it takes.
STREAMS = {
    "fid": "pool", "sfid": "spatial", "fdd": "pool", "frechet_distance": "pool",
    "is": "logits", "pr": "pool", "kid": "pool", "nearest": "pool", "recognised": "logits",
}  # fmt: skip
# What comes of it in a result, where that is not one number of the same name.
GIVES = {
    "pr": ("precision", "recall", "density", "coverage"), "nearest": ("nearest", "copies"),
    "recognised": ("recognised", "classifier_heldout_accuracy"),
}  # fmt: skip
# The numbers of a result, in their order: what each is called wherever it is shown, and which way it gets better.
METRICS = {
    "fid": ("FID", "lower"), "sfid": ("sFID", "lower"), "fdd": ("FD-DINOv2 (not a FID)", "lower"),
    "frechet_distance": ("Fréchet distance (not a FID)", "lower"), "is": ("Inception score", "higher"),
    "precision": ("Precision", "higher"), "recall": ("Recall", "higher"), "density": ("Density", "higher"),
    "coverage": ("Coverage", "higher"), "kid": ("KID", "lower"),
    "nearest": ("Distance to the nearest image (1: as real images)", None), "copies": ("Copies (0.01: none)", None),
    "recognised": ("Recognised", "higher"), "classifier_heldout_accuracy": ("Classifier on held-out images", None),
}  # fmt: skip
# Of a classifier: its accuracy on held-out images, None where that is not known, how many these were, and the step of
# the evaluation where the weights are of a later one.
HELD_OUT = ("heldout_accuracy", "heldout_num", "heldout_step")
# What an extractor is described by beside what features depend on: a copy of its weights may not know it.
BESIDE = (*HELD_OUT, "image_size")
INCEPTION = "adm-inception-"  # what the protocols of Inception begin with, whose distances alone are FIDs
DIGITS_TRAIN = "digits train split"  # what a result calls the reference `digits`
DIGITS = "digits-classifier-2"  # the protocol of the digits' own classifier
FOLDER = "features folder"  # as messages call a folder of features
REMEDY = "delete it, or choose another folder for the features"

"""From images to features, scores and their error bars, references and tables; no model is seen here."""

MODULES = (
    "digits", "extract", "extractor", "features", "frechet", "inception_score", "jackknife", "kernel",
    "manifold", "moments", "refs", "result", "score", "sources", "table", "verify",
)  # fmt: skip
SHARD, BATCH = 1000, 64  # images per file of features, and at once
# What can be asked for, the stream of features that it takes, and what each kind of extractor offers.
STREAMS = {
    "fid": "pool", "sfid": "spatial", "fdd": "pool", "frechet_distance": "pool",
    "is": "logits", "pr": "pool", "kid": "pool", "recognised": "logits",
}  # fmt: skip
DIGITS = "digits-classifier-2"  # the protocol of the digits' own classifier
FOLDER = "features folder"  # as messages call a folder of features
REMEDY = "delete it, or choose another folder for the features"

"""The data plane: folders -> shards -> an exact, elastic, verified stream of batches.

tar        what a shard may hold           store      where bytes come from
shards     the dataset folder              location   which addresses there are, and how they are shown
listing    images, keys and classes        remote     ranges of http(s), s3, gs and hf objects: deadlines, retries
members    members of a tar -> samples     endpoint   s3, gs, hf -> signed requests
sources    what shards are made from       wire       a connection that never waits for ever
decode     bytes -> image                  cache      whole remote shards on the local disk
augment    image -> views                  eviction   room in it
order      which sample comes when         prefetch   the shards of the next positions, ahead of their use
mixture    several datasets by weight      quarantine samples that cannot be decoded: known, found, counted
shuffle    how well an order mixes         stages     seconds of reading, decoding, augmenting, collating
stream     all of it as batches            diagnosis  what bounds the loader, and what to change
tokens     codes of views, made before     jitter     colours, on the device
randaugment  a view changed, keyed          mixing     erasing, mixup, CutMix, on the device
plan, write, make, join, reshard, shrink   images -> dataset folder
index      existing tars -> dataset folder verify     every byte once, quarantine
"""

"""The data plane: folders -> shards -> an exact, elastic, verified stream of batches.

tar        what a shard may hold           store      where bytes come from
shards     the dataset folder              location   which addresses there are, and how they are shown
listing    images, keys and classes        remote     ranges of http(s), s3, gs and hf objects: deadlines, retries
write      tars, index, statistics         endpoint   s3, gs, hf -> signed requests
make       folder -> dataset folder        wire       a connection that never waits for ever
order      which sample comes when         cache      whole remote shards on the local disk
decode     bytes -> image                  eviction   room in it
augment    image -> views                  prefetch   the shards of the next positions, ahead of their use
stream     all of it as batches
"""

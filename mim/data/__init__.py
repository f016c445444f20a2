"""The data plane: folders -> shards -> an exact, elastic, verified stream of batches.

tar        what a shard may hold           store     where bytes come from
shards     the dataset folder              order     which sample comes when
listing    images, keys and classes        decode    bytes -> image
write      tars, index, statistics         augment   image -> views
make       folder -> dataset folder        stream    all of it as batches
"""

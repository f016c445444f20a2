"""The data plane: folders -> shards -> an exact, elastic, verified stream of batches.

tar        what a shard may hold           store     where bytes come from
shards     the dataset folder              order     which sample comes when
listing    images, keys and classes        decode    bytes -> image
members    members of a tar -> samples     augment   image -> views
sources    what shards are made from       stream    all of it as batches
plan, write, make, join, reshard, shrink   images -> dataset folder
index      existing tars -> dataset folder verify    every byte once, quarantine
"""

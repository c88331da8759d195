"""The treecode: exact near field, mean far field.

law       what a node may hold of a query's softmax
plan      levels of a tree and groups of queries, known from the shapes
tree      the trees of chunks of keys, and what groups of queries opened in them
balance   how queries and keys are stretched before they are split
forest    which queries meet which trees, and how the parts are merged
"""

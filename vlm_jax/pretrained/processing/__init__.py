"""Processors of released systems, configured by the files of a checkpoint folder; one file a family.

Each has a function of a folder and its config that gives a `processors.system.Processor`.
"""

"""Models in and out of the folders that `transformers` reads: safetensors and JSON, no pickle.

shapes    config.json and our keys        tokenizer_files  what stands beside the weights
tensors   their tensors and ours          folder           a folder of theirs, opened
importing longhaul import                 exporting        longhaul export
loading   an exported folder as a model   memory_files     what their format has no place for
"""

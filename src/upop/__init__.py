"""UPop: unified and progressive pruning of vision-language transformers."""

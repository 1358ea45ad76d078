"""What `upop.save` writes: the folder, its model card, and the record by which transformers loads it again."""

"""What context-parallel ranks exchange (`batch.RowShare`): keys and values in every layer, and what each makes of its
own rows; and tensor-parallel ranks, of the images that they share out."""

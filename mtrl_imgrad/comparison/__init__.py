"""`mtrl-imgrad compare`: the same experiment with several aggregators and seeds, in processes of their own."""

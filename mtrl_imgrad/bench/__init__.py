"""`mtrl-imgrad bench`: what things cost on the machine it runs on."""

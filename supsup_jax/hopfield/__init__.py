"""HopSupSup: masks as memories of a Hopfield network."""

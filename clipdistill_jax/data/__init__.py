"""Reading datasets: raw files -> prepared records -> batches. TensorFlow is imported only when it is used."""

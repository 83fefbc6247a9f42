"""Pure tensor functions: a torch reference, a Triton kernel and one public function each."""

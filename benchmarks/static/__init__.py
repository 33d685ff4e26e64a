"""What kernels cost by the code that compilers make of them, for chips that need not be there."""

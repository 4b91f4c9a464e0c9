"""Operations under the names and signatures that the StyleGAN family uses, in plain PyTorch."""

"""Numbers that compare images: PSNR and SSIM per pixel, Frechet distances of network features."""

"""Operations on torch models: finding layers, calibration data, moments and ranges, offloading, several processes."""

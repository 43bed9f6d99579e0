"""What the papers found on ImageNet, looked for on the digits."""

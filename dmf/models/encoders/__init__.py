"""Frozen networks: autoencoders of latents, and the encoders that features are measured with.

`autoencoder` holds the protocol of all autoencoders and the methods that most have in common,
`autoencoder_kl`, `autoencoder_dc`, `taesd` and `rae` hold one each; `latent_scaling` and
`latent_space` say how latents become samples and samples images. `dinov2` and
`inception` are the encoders of evaluation, and `patch_features` the features of representation
alignment (REPA). For those who add an autoencoder or an encoder. It imports
`dmf.runtime.sharding`, `dmf.errors` and `dmf.types`, and no other network.
"""

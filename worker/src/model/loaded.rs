//! A model folder, opened and on a device.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use cairn_stack::config::{ConfigError, ModelConfig};
use cairn_stack::digest::Digest;
use cairn_stack::quantize::Quantize;

use super::llama::Llama;
use super::weights::{WeightsError, load};
use crate::data::{DataError, Encoder};
use crate::device::{DeviceError, DeviceName};

/// Why a model folder could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Its config is broken or asks for something unsupported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its tokenizer or chat template is broken or missing.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Its weights are broken, missing or not those of the config.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A model on a device, ready to be trained on or scored with, any number of times.
pub struct LoadedModel {
    /// The folder it came from.
    pub dir: PathBuf,
    /// The device it is on.
    pub device: Device,
    /// The device's name.
    pub device_name: DeviceName,
    /// The model.
    pub llama: Llama,
    /// Digest of all weights as they were read, in f32.
    pub digest: Digest,
    /// How the linear layers are kept.
    pub quantize: Quantize,
}

impl LoadedModel {
    /// Loads config and weights as they are in the folder. The config and the names and shapes of all
    /// tensors are checked before the first weight is read.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn load(dir: &Path, device_name: DeviceName) -> Result<Self, ModelError> {
        Self::load_quantised(dir, Quantize::None, device_name)
    }

    /// The same with the linear layers of the blocks in fewer bits.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn load_quantised(
        dir: &Path,
        quantize: Quantize,
        device_name: DeviceName,
    ) -> Result<Self, ModelError> {
        let config = ModelConfig::load(dir)?;
        let device = device_name.open()?;
        let (llama, digest) = load(dir, config, quantize, &device)?;
        Ok(Self {
            dir: dir.to_owned(),
            device,
            device_name,
            llama,
            digest,
            quantize,
        })
    }

    /// The folder's tokenizer and chat template.
    ///
    /// # Errors
    /// [`ModelError::Data`].
    pub fn encoder(&self) -> Result<Encoder, ModelError> {
        Ok(Encoder::load(&self.dir)?)
    }
}

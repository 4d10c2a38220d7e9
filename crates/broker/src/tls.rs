//! The broker's certificate: the owner's, or one that the broker signs itself at its first start and that customers
//! pin. `main` asks for it, `serve` speaks TLS 1.3 with it.

use anyhow::{Context, Result, ensure};
use onde_client::tls::{Pin, provider};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A certificate with its key, ready for use.
pub struct Identity {
    /// What connections are made with.
    pub config: Arc<ServerConfig>,
    /// What customers may pin.
    pub pin: Pin,
}

impl Identity {
    /// Reads a certificate, with those between it and an authority behind it, and its key; both as PEM.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self> {
        let in_file = |file: &Path| format!("in {}", file.display());
        let chain = CertificateDer::pem_file_iter(certificate)
            .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
            .with_context(|| in_file(certificate))?;
        ensure!(!chain.is_empty(), "no certificate in {}", certificate.display());
        let private = PrivateKeyDer::from_pem_file(key).with_context(|| in_file(key))?;
        let pin = Pin::of(&chain[0]);
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .with_context(|| in_file(certificate))?;
        Ok(Self { config: Arc::new(config), pin })
    }

    /// The certificate that the broker made in `dir` at its first start; makes it if there is none. Its pin is
    /// written beside it for whoever tells customers.
    pub fn load_or_make(dir: &Path, address: IpAddr) -> Result<Self> {
        let file = |name: &str| dir.join(name);
        let (certificate, key) = (file("tls.crt"), file("tls.key"));
        if !certificate.exists() {
            let names = [address.to_string(), "localhost".to_owned()];
            let made = rcgen::generate_simple_self_signed(names)?;
            // The certificate last: it is what says that all is there.
            write(&key, &made.signing_key.serialize_pem())?;
            write(&certificate, &made.cert.pem())?;
        }
        let identity = Self::load(&certificate, &key)?;
        write(&file("tls.pin"), &format!("{}\n", identity.pin))?;
        Ok(identity)
    }
}

/// Writes a file that only the broker's user may read; all of it or nothing.
fn write(path: &Path, text: &str) -> Result<()> {
    let aside = PathBuf::from(format!("{}.new", path.display()));
    let write = || -> std::io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&aside, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

//! The HTTP client of the commands: one request per connection, over TCP or a unix socket.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::api::types::{ErrorBody, ErrorDetail};

/// Time for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Time for an answer: longer than the API waits for work in progress.
const ANSWER_LIMIT: Duration = Duration::from_secs(660);
/// Longest answer.
const ANSWER_BYTES: usize = 256 << 20;
/// Where the API is if nobody says otherwise.
const DEFAULT_TCP: &str = "127.0.0.1:4321";
const DEFAULT_RUN_DIR: &str = "/run/torus";

/// Where an API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// `host:port`.
    Tcp(String),
    /// Path of a unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Reads `ADDR` (`host`, `host:port`, `http://host:port`) or `unix:PATH`.
///
/// # Errors
/// An empty address, or a port that is none.
pub fn parse_endpoint(text: &str) -> Result<Endpoint, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return if path.is_empty() {
            Err("unix: needs a path".into())
        } else {
            Ok(Endpoint::Unix(path.into()))
        };
    }
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let bare = |host: &str| !host.is_empty() && !host.contains(['/', ' ', '@']);
    match address.rsplit_once(':') {
        // An IPv6 address without brackets ends in a colon and a group, not in a port.
        Some((host, port)) if bare(host) && (!host.contains(':') || host.starts_with('[')) => {
            match port.parse::<u16>() {
                Ok(port) if port > 0 => Ok(Endpoint::Tcp(address.to_owned())),
                _ => Err(format!("\"{port}\" is not a port")),
            }
        }
        None if bare(address) => Ok(Endpoint::Tcp(format!("{address}:4321"))),
        _ => Err(format!("\"{text}\" is not an address; write HOST:PORT or unix:PATH")),
    }
}

/// Why there is no answer, or a bad one.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nothing answers.
    #[error("no Torus API at {tried}: {reason}; check that torusd runs, or name another with --api")]
    Unreachable {
        /// Where was tried.
        tried: String,
        /// What happened.
        reason: String,
    },
    /// The API refused.
    #[error("{}{}{}", .0.message, if .0.hint.is_empty() { "" } else { "; " }, .0.hint)]
    Refused(ErrorDetail),
    /// The answer makes no sense, or broke off.
    #[error(
        "the answer of {endpoint} cannot be used: {reason}; it may be of another version (torusctl version)"
    )]
    Answer {
        /// Who answered.
        endpoint: String,
        /// What is wrong.
        reason: String,
    },
}

/// A client of one API.
#[derive(Debug, Clone)]
pub struct Client {
    endpoints: Vec<Endpoint>,
}

impl Client {
    /// A client of the endpoint, or else of the default ones: the unix socket, then 127.0.0.1:4321.
    #[must_use]
    pub fn new(endpoint: Option<Endpoint>) -> Self {
        let run_dir =
            std::env::var_os("TORUS_RUN_DIR").map_or_else(|| PathBuf::from(DEFAULT_RUN_DIR), PathBuf::from);
        let defaults = || vec![Endpoint::Unix(run_dir.join("api.sock")), Endpoint::Tcp(DEFAULT_TCP.into())];
        Self { endpoints: endpoint.map_or_else(defaults, |endpoint| vec![endpoint]) }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, None::<&()>).await
    }

    /// Sends a request, with a body if there is one, and reads the answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let mut failures = Vec::new();
        for endpoint in &self.endpoints {
            let answer_error =
                |reason: String| ClientError::Answer { endpoint: endpoint.to_string(), reason };
            let body = match body {
                Some(body) => serde_json::to_vec(body).map_err(|e| answer_error(e.to_string()))?,
                None => Vec::new(),
            };
            let request = Request::builder()
                .method(method.clone())
                .uri(path)
                .header("host", "torus")
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(body)))
                .map_err(|e| answer_error(e.to_string()))?;
            let connecting = async {
                match endpoint {
                    Endpoint::Tcp(address) => TcpStream::connect(address).await.map(Connection::Tcp),
                    Endpoint::Unix(path) => UnixStream::connect(path).await.map(Connection::Unix),
                }
            };
            let connected = tokio::time::timeout(CONNECT_LIMIT, connecting).await;
            let connection = match connected {
                Ok(Ok(connection)) => connection,
                Ok(Err(error)) => {
                    failures.push(error.to_string());
                    continue;
                }
                Err(_) => {
                    failures.push(format!("no connection within {CONNECT_LIMIT:?}"));
                    continue;
                }
            };
            let exchange = async {
                match connection {
                    Connection::Tcp(stream) => exchange(stream, request).await,
                    Connection::Unix(stream) => exchange(stream, request).await,
                }
            };
            let (status, bytes) = tokio::time::timeout(ANSWER_LIMIT, exchange)
                .await
                .map_err(|_| answer_error("no answer in time".into()))?
                .map_err(|error| answer_error(error.to_string()))?;
            return read_answer(status, &bytes, answer_error);
        }
        let tried = self.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
        Err(ClientError::Unreachable { tried, reason: failures.join("; ") })
    }
}

enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), BoxError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES).collect().await?.to_bytes();
    drop(sender);
    driver.abort();
    Ok((status, body))
}

fn read_answer<T: DeserializeOwned>(
    status: StatusCode,
    bytes: &[u8],
    error: impl Fn(String) -> ClientError,
) -> Result<T, ClientError> {
    if status.is_success() {
        return serde_json::from_slice(bytes).map_err(|e| error(e.to_string()));
    }
    match serde_json::from_slice::<ErrorBody>(bytes) {
        Ok(body) => Err(ClientError::Refused(body.error)),
        Err(_) => Err(error(format!("HTTP status {status}"))),
    }
}

/// A name as one segment of a path.
#[must_use]
pub fn segment(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_parse() {
        let tcp = |text: &str| Ok(Endpoint::Tcp(text.into()));
        assert_eq!(parse_endpoint("127.0.0.1:80"), tcp("127.0.0.1:80"));
        assert_eq!(parse_endpoint("node1"), tcp("node1:4321"));
        assert_eq!(parse_endpoint("http://node1:4321/"), tcp("node1:4321"));
        assert_eq!(parse_endpoint("[::1]:4321"), tcp("[::1]:4321"));
        assert_eq!(parse_endpoint("unix:/run/x"), Ok(Endpoint::Unix("/run/x".into())));
        for bad in ["", ":1", "unix:", "a:b", "a:0", "::1", "https://a", "a b"] {
            assert!(parse_endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_cannot_leave_their_segment() {
        assert_eq!(segment("a-b_c.9"), "a-b_c.9");
        assert_eq!(segment("../x?y#z é"), "..%2Fx%3Fy%23z%20%C3%A9");
    }
}

//! What a client may ask for, and what it is answered. Everything that is not listed here is refused.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use russh::keys::PublicKey;
use russh::server::VerifiedPublicKey;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session as Ssh};
use russh::{
    Channel, ChannelId, ChannelOpenFailure, ChannelWriteHalf, Disconnect, MethodKind, MethodSet,
    Pty, Sig,
};
use smolvm_engine::ssh::{SSH_ADDRESS, may_enter};
use smolvm_engine::store::Store;
use smolvm_engine::{Endpoint, ExecSpec, Program, Session, TerminalSize};
use tokio::sync::{Semaphore, oneshot};

use super::Ground;
use super::command::{self, Input, Line, Reins, Steer};
use super::forward::{self, Remote};
use super::gate::Gate;
use crate::ports::Line as GuestLine;

/// Channels that one connection may have open, and as many more that came from the guest.
const CHANNELS_MAX: usize = 64;

/// Ports of the guest at which somebody may listen for one connection.
const REMOTES_MAX: usize = 16;

/// Variables that one channel may set.
const VARIABLES_MAX: usize = 64;

/// Bytes of a variable's value.
const VALUE_BYTES_MAX: usize = 4096;

/// One client's connection.
#[derive(Debug)]
pub(super) struct Door {
    ground: Arc<Ground>,
    gate: Arc<Gate>,
    peer: SocketAddr,
    /// Told when the client has shown a key.
    entered: Option<oneshot::Sender<()>>,
    /// Who the client is in the guest.
    user: String,
    /// The way to the guest.
    line: GuestLine,
    channels: HashMap<ChannelId, Open>,
    /// Ports of the guest at which somebody listens for the client, by what it asked for.
    remotes: HashMap<(String, u32), Remote>,
    /// Places for what comes by them.
    room: Arc<Semaphore>,
}

/// A channel for a command.
#[derive(Debug)]
struct Open {
    env: Vec<(String, String)>,
    terminal: Option<TerminalSize>,
    /// Until it runs.
    write: Option<ChannelWriteHalf<Msg>>,
    /// From when it runs.
    reins: Option<Reins>,
}

impl Door {
    pub(super) fn new(
        ground: Arc<Ground>,
        gate: Arc<Gate>,
        peer: SocketAddr,
        entered: oneshot::Sender<()>,
    ) -> Self {
        Self {
            line: ground.line.another(),
            ground,
            gate,
            peer,
            entered: Some(entered),
            user: String::new(),
            channels: HashMap::new(),
            remotes: HashMap::new(),
            room: Arc::new(Semaphore::new(CHANNELS_MAX)),
        }
    }

    /// Whether this key opens the sandbox. Looked up each time: it may be closed meanwhile.
    fn judge(&self, key: &PublicKey) -> Auth {
        let layout = &self.ground.layout;
        let spec = Store::open_existing(&layout.database())
            .ok()
            .flatten()
            .and_then(|store| store.sandbox(&self.ground.id).ok().flatten())
            .and_then(|row| row.spec.ssh);
        match spec {
            Some(spec) if may_enter(layout, &spec, key) => Auth::Accept,
            _ => Auth::Reject {
                proceed_with_methods: Some(MethodSet::from(&[MethodKind::PublicKey][..])),
                partial_success: false,
            },
        }
    }

    async fn guest(&self) -> Result<Session, russh::Error> {
        self.line.session().await.map_err(|error| {
            tracing::warn!(reason = error.in_one_line(), "no way to the guest");
            russh::Error::Disconnect
        })
    }

    /// Runs something on a channel, once.
    async fn run(
        &mut self,
        channel: ChannelId,
        program: Program,
        words: Vec<Vec<u8>>,
        ssh: &mut Ssh,
    ) -> Result<(), russh::Error> {
        use std::os::unix::ffi::OsStringExt;

        let guest = self.guest().await?;
        let user = Some(self.user.clone()).filter(|user| !user.is_empty());
        let ports = (self.peer, self.ground.port);
        let Some(open) = self.channels.get_mut(&channel) else {
            return ssh.channel_failure(channel);
        };
        let Some(write) = open.write.take() else {
            return ssh.channel_failure(channel);
        };
        let mut env = connection_variables(ports.0, ports.1);
        env.append(&mut open.env);
        let spec = ExecSpec {
            env,
            user,
            // What transfers files wants no terminal, whatever was asked for before.
            terminal: open.terminal.filter(|_| program != Program::Sftp),
            stdin: true,
            program,
            ..ExecSpec::new(
                words
                    .into_iter()
                    .map(std::ffi::OsString::from_vec)
                    .collect(),
            )
        };
        let line = Line {
            write,
            handle: ssh.handle(),
            gate: Arc::clone(&self.gate),
        };
        ssh.channel_success(channel)?;
        open.reins = Some(command::start(guest, spec, line));
        Ok(())
    }

    /// Whether one more channel may be opened.
    fn has_room(&mut self) -> bool {
        // A channel that was refused, or whose command has ended, is of no account.
        self.channels
            .retain(|_, open| open.reins.as_ref().is_none_or(|reins| !reins.is_over()));
        self.channels.len() < CHANNELS_MAX
    }

    /// Connects a channel to a place in the guest.
    async fn connect(
        &mut self,
        to: Endpoint,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        ssh: &mut Ssh,
    ) -> Result<(), russh::Error> {
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let guest = self.guest().await?;
        let id = channel.id();
        let gate = Arc::clone(&self.gate);
        let reins = forward::connect(guest, to, channel, reply, ssh.handle(), gate);
        self.channels.insert(
            id,
            Open {
                env: Vec::new(),
                terminal: None,
                write: None,
                reins: Some(reins),
            },
        );
        Ok(())
    }

    fn steer(&self, channel: ChannelId, steer: Steer) {
        if let Some(reins) = self.reins(channel) {
            // A command that has ended needs no steering.
            let _ = reins.steer.send(steer);
        }
    }

    fn reins(&self, channel: ChannelId) -> Option<&Reins> {
        self.channels.get(&channel)?.reins.as_ref()
    }
}

/// What sshd(8) tells a command of its connection.
fn connection_variables(peer: SocketAddr, port: u16) -> Vec<(String, String)> {
    let (address, from) = (peer.ip(), peer.port());
    vec![
        (
            "SSH_CONNECTION".to_owned(),
            format!("{address} {from} {} {port}", SSH_ADDRESS),
        ),
        ("SSH_CLIENT".to_owned(), format!("{address} {from} {port}")),
    ]
}

/// Whether a client may set this variable: what says how it likes its words and colours.
fn is_accepted(name: &str) -> bool {
    let is_locale = name == "LANG" || name.starts_with("LC_");
    let letters = |c: char| c.is_ascii_uppercase() || c == '_';
    (is_locale && name.chars().all(letters)) || matches!(name, "COLORTERM" | "NO_COLOR")
}

/// A size as the guest takes it. A client that knows none sends zeros, which stay: they mean that.
fn size(columns: u32, rows: u32) -> TerminalSize {
    let bounded = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    TerminalSize {
        rows: bounded(rows),
        columns: bounded(columns),
    }
}

impl Handler for Door {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        _user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(self.judge(offer.public_key))
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, Self::Error> {
        let judged = self.judge(key.public_key);
        if judged == Auth::Accept {
            user.clone_into(&mut self.user);
        }
        Ok(judged)
    }

    async fn auth_succeeded(&mut self, _ssh: &mut Ssh) -> Result<(), Self::Error> {
        if let Some(entered) = self.entered.take() {
            // Whoever waits for it ends with this connection.
            let _ = entered.send(());
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let id = channel.id();
        // What arrives comes to `data` and its like, which hold nobody up.
        let (_, write) = channel.split();
        self.channels.insert(
            id,
            Open {
                env: Vec::new(),
                terminal: None,
                write: Some(write),
                reins: None,
            },
        );
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host_to_connect: &str,
        port_to_connect: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        match forward::endpoint(host_to_connect, port_to_connect) {
            Some(to) if !host_to_connect.is_empty() => self.connect(to, channel, reply, ssh).await,
            _ => {
                reply.reject(ChannelOpenFailure::ConnectFailed).await;
                Ok(())
            }
        }
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: Channel<Msg>,
        socket_path: &str,
        reply: ChannelOpenHandle,
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        let to = Endpoint::Local(socket_path.as_bytes().to_vec().into());
        self.connect(to, channel, reply, ssh).await
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        ssh: &mut Ssh,
    ) -> Result<bool, Self::Error> {
        let Ok(wanted) = u16::try_from(*port) else {
            return Ok(false);
        };
        if self.remotes.len() >= REMOTES_MAX {
            return Ok(false);
        }
        let guest = self.guest().await?;
        let (gate, room) = (Arc::clone(&self.gate), Arc::clone(&self.room));
        let listening = forward::listen(guest, address, wanted, ssh.handle(), gate, room).await;
        Ok(match listening {
            Some((found, remote)) => {
                *port = found.into();
                self.remotes.insert((address.to_owned(), *port), remote);
                true
            }
            None => false,
        })
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        port: u32,
        _ssh: &mut Ssh,
    ) -> Result<bool, Self::Error> {
        Ok(self.remotes.remove(&(address.to_owned(), port)).is_some())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        self.channels.remove(&channel);
        Ok(())
    }

    async fn channel_eof(&mut self, channel: ChannelId, _ssh: &mut Ssh) -> Result<(), Self::Error> {
        if let Some(reins) = self.reins(channel) {
            let _ = reins.input.send(Input::End);
        }
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        let Some(reins) = self.reins(channel) else {
            return Ok(());
        };
        match self.gate.arrived(data.len()) {
            Ok(waiting) => {
                let _ = reins.input.send(Input::Data(data.to_vec().into(), waiting));
                Ok(())
            }
            Err(_) => ssh.disconnect(
                Disconnect::ByApplication,
                "the command takes no input while its output is not read",
                "en",
            ),
        }
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        _modes: &[(Pty, u32)],
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        let is_name = |c: char| c.is_ascii_graphic();
        match self.channels.get_mut(&channel) {
            Some(open) if open.reins.is_none() && open.terminal.is_none() => {
                open.terminal = Some(size(col_width, row_height));
                if !term.is_empty() && term.len() <= 64 && term.chars().all(is_name) {
                    open.env.push(("TERM".to_owned(), term.to_owned()));
                }
                ssh.channel_success(channel)
            }
            _ => ssh.channel_failure(channel),
        }
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        variable_name: &str,
        variable_value: &str,
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        let fits = is_accepted(variable_name)
            && variable_value.len() <= VALUE_BYTES_MAX
            && !variable_value.contains('\0');
        match self.channels.get_mut(&channel) {
            Some(open) if fits && open.reins.is_none() && open.env.len() < VARIABLES_MAX => {
                open.env
                    .push((variable_name.to_owned(), variable_value.to_owned()));
                ssh.channel_success(channel)
            }
            _ => ssh.channel_failure(channel),
        }
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        self.run(channel, Program::Shell, Vec::new(), ssh).await
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        let words = vec![b"-c".to_vec(), data.to_vec()];
        self.run(channel, Program::Shell, words, ssh).await
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        if name == "sftp" {
            self.run(channel, Program::Sftp, Vec::new(), ssh).await
        } else {
            ssh.channel_failure(channel)
        }
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        _ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        self.steer(channel, Steer::Resize(size(col_width, row_height)));
        Ok(())
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        _ssh: &mut Ssh,
    ) -> Result<(), Self::Error> {
        if let Some(number) = command::number_of(&signal) {
            self.steer(channel, Steer::Signal(number));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_words_and_colours_may_be_set() {
        for name in ["LANG", "LC_ALL", "LC_CTYPE", "COLORTERM", "NO_COLOR"] {
            assert!(is_accepted(name), "{name}");
        }
        for name in [
            "",
            "PATH",
            "LD_PRELOAD",
            "LC_x",
            "LC_A=B",
            "LC_A\n",
            "LANGUAGE",
            "BASH_ENV",
            "TERM",
        ] {
            assert!(!is_accepted(name), "{name}");
        }
    }

    #[test]
    fn sizes_over_the_guests_numbers_are_cut() {
        let cut = size(70_000, 50);
        assert_eq!((cut.columns, cut.rows), (u16::MAX, 50));
    }
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/onspire"
	"github.com/hanse-mesh/hanse/identity/peercred"
)

// drainTime bounds how long open calls may take when hansed ends.
const drainTime = 5 * time.Second

// serve opens every listener before it serves on any, so that a start that cannot succeed fails whole.
func (p *controlPlane) serve(ctx context.Context) error {
	var servers []func(context.Context) error
	var opened []net.Listener
	fail := func(err error) error {
		for _, l := range opened {
			l.Close()
		}
		return err
	}
	tcp := func(what, addr string, federation bool) (net.Listener, error) {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("%s: listen on %s: %w", what, addr, err)
		}
		l = p.board.listen(l, federation)
		opened = append(opened, l)
		return l, nil
	}

	// 7443: federation and join.
	l, err := tcp("federation", p.cfg.Federation.Listen, true)
	if err != nil {
		return fail(err)
	}
	fed := l
	servers = append(servers, func(ctx context.Context) error { return p.mesh.Serve(ctx, fed) })

	// 7444: SPIRE Server API for agents, and on a Unix socket for administrators; where SPIRE issues, both are its own.
	if p.spire != nil {
		api, err := p.serveSPIREAPI(tcp, &opened)
		if err != nil {
			return fail(err)
		}
		servers = append(servers, api...)
	}

	// 7445: xDS.
	if l, err = tcp("xDS", p.cfg.XDS.Listen, false); err != nil {
		return fail(err)
	}
	xds := grpc.NewServer(p.xds.ServerOptions()...)
	p.xds.Register(xds)
	servers = append(servers, serveGRPC(xds, l))

	// 7446: bundle endpoint.
	if l, err = tcp("bundle endpoint", p.cfg.Bundle.Listen, false); err != nil {
		return fail(err)
	}
	endpoint := p.bundles.Handler()
	if p.onSPIRE != nil {
		endpoint = p.bundles.Relay(onspire.RelayPath, endpoint)
	}
	bundles := httpServer(endpoint, p.log)
	bundles.TLSConfig = bundle.EndpointTLS(p.source)
	servers = append(servers, serveHTTP(bundles, l, true))

	// The same for those who go by the web's authorities.
	if w := p.cfg.Bundle.Web; w.Listen != "" {
		if l, err = tcp("https_web bundle endpoint", w.Listen, false); err != nil {
			return fail(err)
		}
		web := httpServer(endpoint, p.log)
		if web.TLSConfig, err = bundle.WebTLS(w.CertFile, w.KeyFile, p.log.With("part", "bundles")); err != nil {
			return fail(err)
		}
		servers = append(servers, serveHTTP(web, l, true))
	}

	// 7448: admission reviews of Kubernetes.
	if p.webhook != nil {
		if l, err = tcp("webhook", p.cfg.KubeAPI.Webhook.Listen, false); err != nil {
			return fail(err)
		}
		reviews := httpServer(p.webhook.handler(), p.log)
		reviews.TLSConfig = p.webhook.tls()
		servers = append(servers, serveHTTP(reviews, l, true))
	}

	// The socket of hanse, and 7447 for it from afar.
	if l, err = unixListener(p.cfg.Socket); err != nil {
		return fail(err)
	}
	opened = append(opened, l)
	local := admin.Handler(p, p.log.With("part", "admin"))
	handler := local
	if !p.replicas.alone() {
		handler = p.viaLeader(local)
		mux := http.NewServeMux()
		mux.Handle("/", p.viaLeader(local))
		mux.Handle("POST /replica/v1/proxies", p.exchange)
		servers = append(servers, serveHTTP(streaming(mux, p.log), p.mesh.Replicas(), false))
	}
	servers = append(servers, serveHTTP(streaming(handler, p.log), l, false))
	if p.cfg.Remote.Listen != "" {
		if l, err = tcp("remote administration", p.cfg.Remote.Listen, false); err != nil {
			return fail(err)
		}
		remote := streaming(handler, p.log)
		remote.TLSConfig = identity.Reporting(identity.ServerTLS(p.source, func(id spiffeid.ID) error {
			if !identity.IsAdminID(p.td, id) {
				return fmt.Errorf("%s is no administrator of %s", id, p.td)
			}
			return nil
		}, "http/1.1"))
		servers = append(servers, serveHTTP(remote, l, true))
	}
	p.log.Info("serving", "federation", p.cfg.Federation.Listen, "identity", p.cfg.Identity.Listen, "xds", p.cfg.XDS.Listen,
		"bundle_endpoint", p.cfg.Bundle.Listen, "socket", p.cfg.Socket)
	close(p.listening)

	g, ctx := errgroup.WithContext(ctx)
	for _, s := range servers {
		g.Go(func() error { return s(ctx) })
	}
	return g.Wait()
}

// serveSPIREAPI opens the listeners of the SPIRE Server API.
func (p *controlPlane) serveSPIREAPI(tcp func(what, addr string, federation bool) (net.Listener, error), opened *[]net.Listener) ([]func(context.Context) error, error) {
	l, err := tcp("identity", p.cfg.Identity.Listen, false)
	if err != nil {
		return nil, err
	}
	limits := []grpc.ServerOption{grpc.MaxRecvMsgSize(4 << 20), grpc.ConnectionTimeout(10 * time.Second), grpc.MaxConcurrentStreams(100),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second, MaxConnectionIdle: 10 * time.Minute}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true})}
	limits = append(limits, p.spire.ServerOptions()...)
	agents := grpc.NewServer(append(limits, grpc.Creds(credentials.NewTLS(identity.Reporting(p.spire.TLSConfig()))))...)
	p.spire.RegisterAgent(agents)
	servers := []func(context.Context) error{serveGRPC(agents, l)}

	if l, err = unixListener(filepath.Join(p.cfg.DataDir, "spire-server", "api.sock")); err != nil {
		return nil, err
	}
	*opened = append(*opened, l)
	admins := grpc.NewServer(limits...)
	p.spire.RegisterAdmin(admins)
	return append(servers, serveGRPC(admins, &noting{l, p.log})), nil
}

// noting logs who connects to a Unix socket, as the kernel has it.
type noting struct {
	net.Listener
	log *slog.Logger
}

func (n *noting) Accept() (net.Conn, error) {
	c, err := n.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if caller, err := peercred.Of(c); err == nil {
		n.log.Info("an administrator connects to the SPIRE Server API", "socket", n.Addr().String(), "by", caller.String())
	}
	return c, nil
}

// serveGRPC returns a function that serves until ctx ends, then drains.
func serveGRPC(s *grpc.Server, l net.Listener) func(context.Context) error {
	return func(ctx context.Context) error {
		done := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(done)
			hard := time.AfterFunc(drainTime, s.Stop) // streams of proxies and peers do not end by themselves
			defer hard.Stop()
			s.GracefulStop()
		})
		err := s.Serve(l)
		if !stop() {
			<-done
		}
		if errors.Is(err, grpc.ErrServerStopped) {
			return nil
		}
		return err
	}
}

func serveHTTP(s *http.Server, l net.Listener, tls bool) func(context.Context) error {
	return func(ctx context.Context) error {
		done := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(done)
			drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
			defer cancel()
			if s.Shutdown(drain) != nil {
				s.Close()
			}
		})
		var err error
		if tls {
			err = s.ServeTLS(l, "", "")
		} else {
			err = s.Serve(l)
		}
		if !stop() {
			<-done
		}
		if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil && errors.Is(err, net.ErrClosed) {
			return nil
		}
		return err
	}
}

func httpServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
}

// streaming is a server whose handler sets its own write deadlines, since some answers last.
func streaming(h http.Handler, log *slog.Logger) *http.Server {
	s := httpServer(h, log)
	s.WriteTimeout, s.ReadTimeout = 0, 0
	s.ConnContext = admin.WithCaller
	return s
}

// unixListener listens on a socket that only its owner may use. A socket that a dead process left is replaced; one that answers is not.
func unixListener(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket %s: another process answers there already", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	// The socket is made under a name that nobody knows, closed to others, and then moved into place.
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	l, err := net.Listen("unix", tmp)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return &unlinking{Listener: l, path: path}, nil
}

// unlinking removes its socket when it is closed.
type unlinking struct {
	net.Listener
	path string
}

func (u *unlinking) Close() error {
	return errors.Join(u.Listener.Close(), os.Remove(u.path))
}

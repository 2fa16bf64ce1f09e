package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/dns"
	"github.com/hanse-mesh/hanse/proxy/gateway"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/probe"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
	"github.com/hanse-mesh/hanse/proxy/xdsclient"
)

// serve runs until a signal comes.
func serve(parent context.Context, cfg *Config, stderr io.Writer) error {
	level := new(slog.LevelVar)
	l, err := daemon.ParseLevel(cfg.Log.Level)
	if err != nil {
		return err
	}
	level.Set(l)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200) // a small heap is collected often: a few MiB more are a tenth less CPU
	}
	threads := newThreads()
	log := daemon.Logger(stderr, level).With("cluster", cfg.Cluster, "role", cfg.Role)
	ctx, stop := daemon.Signals(parent, log)
	defer stop()

	reg := daemon.NewRegistry()
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return err
	}
	dialer := cfg.dialer()
	dial := func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) }
	ids, err := agent.New(agent.Config{
		ServerAddrs: cfg.ControlPlane.Identity, TrustDomain: td, TrustBundle: cfg.ControlPlane.TrustBundle, TokenFile: cfg.ControlPlane.TokenFile,
		PodToken: cfg.ControlPlane.PodToken, PodCluster: cfg.Cluster,
		StateDir: filepath.Join(cfg.StateDir, "identity"), WorkloadAPI: cfg.ControlPlane.WorkloadAPI, SocketPath: given(cfg.Socket),
		SocketUsers: agent.SocketUsers{Any: cfg.SocketUsers.Any, IDs: cfg.SocketUsers.IDs, Groups: cfg.SocketGroups}, Curve: cfg.Keys.elliptic(),
		FilesDir: cfg.Agent.FilesDir, Dial: dial, SyncInterval: cfg.Timers.Sync.Duration, Log: log, Registerer: reg,
	})
	if err != nil {
		return err
	}
	p := &process{cfg: cfg, log: log, dial: dialer.DialContext, ids: ids, source: ids.Source()}

	client := hop.NewClient(hop.ClientConfig{
		Source: p.source, Dial: dialer.DialContext, ConnectTimeout: cfg.Timers.Connect.Duration, PingAfter: cfg.Timers.PingAfter.Duration,
		DeadAfter: cfg.Timers.DeadAfter.Duration, IdleClose: cfg.Timers.IdleClose.Duration, Log: log, Metrics: reg,
	})
	p.hop = client
	health := sidecar.NewHealth(client, dialer.DialContext)
	p.balancer = balance.New(balance.Config{ID: cfg.NodeID, Log: log, Registerer: reg, Probe: health.Probe, SuspectGateway: health.Suspect})
	xdsConfig := xdsclient.Config{
		Addrs: cfg.ControlPlane.XDS, Source: p.source, ServerID: identity.ControlPlaneID(td),
		Node: xdsclient.Node{ID: cfg.NodeID, Cluster: cfg.Cluster, Network: cfg.Network, Region: cfg.Region, Zone: cfg.Zone,
			Namespace: cfg.Namespace, Role: cfg.Role, WorkloadIPs: workloadIPs(cfg), Version: daemon.Version},
		StateDir: filepath.Join(cfg.StateDir, "xds"), Dial: dial, Log: log, Registerer: reg, Trust: p.trust,
	}
	if cfg.Role == roleSidecar {
		xdsConfig.Load = p.balancer
	}
	if p.xds, err = xdsclient.New(xdsConfig); err != nil {
		return err
	}

	adminListener, err := net.Listen("tcp", cfg.Admin.Listen)
	if err != nil {
		return fmt.Errorf("admin port: %w", err)
	}
	admin := &daemon.Admin{Ready: p.ready, Gatherer: reg, Level: level, Snapshot: p.snapshot, Log: log}
	var g daemon.Group
	g.Add("admin port", func(ctx context.Context) error { return admin.Run(ctx, adminListener) })
	g.Add("threads", func(ctx context.Context) error { return threads.run(ctx, log) })
	g.Add("identity agent", ids.Run)
	g.Add("xds client", func(ctx context.Context) error {
		if err := p.source.Wait(ctx); err != nil {
			return endedOr(ctx, err)
		}
		return p.xds.Run(ctx)
	})
	switch cfg.Role {
	case roleSidecar:
		accessLog, closeLog, err := openAccessLog(cfg.Log.Access)
		if err != nil {
			_ = adminListener.Close()
			return err
		}
		defer closeLog()
		tracing, err := newTracing(ctx, cfg, p.dial)
		if err != nil {
			_ = adminListener.Close()
			return err
		}
		resolver, err := p.resolver(reg)
		if err != nil {
			_ = adminListener.Close()
			return err
		}
		if resolver != nil {
			g.Add("dns", resolver.Run)
		}
		if cfg.Health.Listen != "" {
			health := &probe.Server{Listen: cfg.Health.Listen, Checks: cfg.Health.Checks, Node: cfg.Health.node, Workload: netip.MustParseAddr(cfg.Workloads[0].Address), Ready: p.ready, Dial: p.dial, Log: log}
			g.Add("health", health.Run)
		}
		g.Add("tracing", tracing.run)
		g.Add("gateway checks", func(ctx context.Context) error { return health.Run(ctx, p.balancer) })
		g.Add("sidecar", func(ctx context.Context) error {
			sc, err := p.sidecarConfig(ctx)
			if err != nil {
				return endedOr(ctx, err)
			}
			sc.AccessLog, sc.Metrics = accessLog, reg
			if tracing.provider != nil {
				sc.Tracer = tracing.provider.Tracer("github.com/hanse-mesh/hanse/proxy/sidecar")
			}
			s, err := sidecar.New(sc)
			if err != nil {
				return err
			}
			p.sidecar.Store(s)
			p.serving.Store(true)
			log.Info("serving", "id", ownID(p.source), "outbound", cfg.Outbound.Listen, "workloads", len(cfg.Workloads), "listeners", len(cfg.Listeners))
			return s.Run(ctx)
		})
	case roleGateway:
		if cfg.Health.Listen != "" {
			health := &probe.Server{Listen: cfg.Health.Listen, Ready: p.ready, Log: log}
			g.Add("health", health.Run)
		}
		g.Add("gateway", func(ctx context.Context) error {
			if err := p.source.Wait(ctx); err != nil {
				return endedOr(ctx, err)
			}
			ln, err := net.Listen("tcp", cfg.Gateway.Listen)
			if err != nil {
				return err
			}
			gc := gateway.Config{Source: p.source, Control: p.xds, ConnectTimeout: cfg.Timers.Connect.Duration, DrainTimeout: cfg.DrainTimeout.Duration, Log: log, Metrics: reg}
			if cfg.Gateway.DialFrom != "" {
				gc.DialFrom = netip.MustParseAddr(cfg.Gateway.DialFrom) // checked by Validate
			}
			gw := gateway.New(gc)
			p.gateway.Store(gw)
			p.serving.Store(true)
			log.Info("serving", "id", ownID(p.source), "gateway", ln.Addr().String())
			return gw.Serve(ctx, ln)
		})
	case roleAgent:
		if err := writeBootstrap(cfg); err != nil {
			_ = adminListener.Close()
			return err
		}
		p.serving.Store(true)
	}
	log.Info("starting", "version", daemon.Version, "node", cfg.NodeID)
	err = g.Run(ctx, log)
	log.Info("ended")
	return err
}

// process is what the parts share.
type process struct {
	cfg  *Config
	log  *slog.Logger
	dial sidecar.Dial // of connections that must not be captured

	addresses proxy.Addresses // set before anything runs
	pool      *dns.Pool       // likewise; nil: no DNS
	ids       *agent.Agent
	source    *identity.Source
	xds       *xdsclient.Client
	hop       *hop.Client
	balancer  *balance.Balancer
	gateway   atomic.Pointer[gateway.Gateway]
	sidecar   atomic.Pointer[sidecar.Sidecar]
	serving   atomic.Bool
}

// trust loads bundles that the control plane has announced. When it returns nil, no connection rests on what they do not vouch for.
func (p *process) trust(ctx context.Context, t xdsclient.Trust) error {
	want := make(map[spiffeid.TrustDomain]uint64, len(t.Sequences))
	authorities := make(map[spiffeid.TrustDomain][]byte, len(t.Authorities))
	for name, seq := range t.Sequences {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return fmt.Errorf("announced trust domain %q: %w", name, err)
		}
		want[td] = seq
		if d := t.Authorities[name]; len(d) > 0 {
			authorities[td] = d
		}
	}
	refresh := func() error { return p.ids.TrustRefresh(ctx, want) }
	if p.cfg.ControlPlane.WorkloadAPI != "" {
		refresh = func() error { return p.ids.TrustFollowed(ctx, authorities) }
	}
	if err := refresh(); err != nil {
		return err
	}
	if s := p.sidecar.Load(); s != nil {
		s.Reverify()
	}
	return nil
}

// ready says whether the proxy can do its work, also with what was kept while no control plane answers.
func (p *process) ready() error {
	if _, err := p.source.GetX509SVID(); err != nil {
		return err
	}
	if !p.serving.Load() {
		return errors.New("not listening yet")
	}
	if st := p.xds.Status(); p.cfg.Role != roleAgent && !st.Connected && !st.Kept && st.Received.IsZero() {
		return fmt.Errorf("no configuration from the control plane yet: %s", st.LastError)
	}
	return nil
}

// snapshot is /debug/snapshot.
func (p *process) snapshot() any {
	out := map[string]any{
		"config": p.cfg, "version": daemon.Version, "xds": p.xds.Status(), "table": p.xds.Table(),
	}
	if svid, err := p.source.GetX509SVID(); err == nil {
		out["svid"] = map[string]any{"id": svid.ID.String(), "notBefore": svid.Certificates[0].NotBefore, "notAfter": svid.Certificates[0].NotAfter}
	}
	bundles := map[string]any{}
	for td, b := range p.source.Bundles() {
		seq, _ := b.SequenceNumber()
		bundles[td.Name()] = map[string]any{"sequence": seq, "authorities": len(b.X509Authorities())}
	}
	out["bundles"] = bundles
	if g := p.gateway.Load(); g != nil {
		out["connections"] = g.Connections()
		return out
	}
	out["connections"] = p.hop.Connections()
	if p.pool != nil {
		out["dns"] = p.pool.Names()
	}
	clusters := map[string]any{}
	for _, name := range p.balancer.Clusters() {
		if e, ok := p.balancer.Explain(name); ok {
			clusters[name] = e
		}
	}
	out["clusters"] = clusters
	return out
}

// sidecarConfig waits for an identity, then opens the listeners.
func (p *process) sidecarConfig(ctx context.Context) (sc sidecar.Config, err error) {
	if err := p.source.Wait(ctx); err != nil {
		return sc, err
	}
	var opened []net.Listener
	defer func() {
		if err != nil {
			for _, ln := range opened {
				_ = ln.Close()
			}
		}
	}()
	open := func(address string) (net.Listener, error) {
		ln, err := net.Listen("tcp", address)
		if err == nil {
			opened = append(opened, ln)
		}
		return ln, err
	}
	c := p.cfg
	sc = sidecar.Config{
		Source: p.source, Control: p.xds, Hop: p.hop, Dial: p.dial, Balancer: p.balancer, Namespace: c.Namespace,
		Locality:          proxy.Locality{Cluster: c.Cluster, Region: c.Region, Zone: c.Zone},
		ReportPeerAddress: c.Inbound.ReportPeerAddress, ConnectTimeout: c.Timers.Connect.Duration, DrainTimeout: c.DrainTimeout.Duration, Log: p.log,
	}
	if c.Capture.Enabled {
		if sc.Capture, err = c.captureConfig(open); err != nil {
			return sc, err
		}
		sc.Capture.Addresses = p.addresses
	}
	if c.Outbound.Listen != none {
		if sc.Outbound, err = open(c.Outbound.Listen); err != nil {
			return sc, err
		}
	}
	for _, l := range c.Listeners {
		ln, err := open(l.Listen)
		if err != nil {
			return sc, err
		}
		sc.Local = append(sc.Local, sidecar.LocalListener{Listener: ln, Authority: l.To})
	}
	for _, w := range c.Workloads {
		if sc.Inbound, err = open(w.Listen); err != nil {
			return sc, err
		}
		if sc.Workload, err = netip.ParseAddr(w.Address); err != nil {
			return sc, err
		}
		sc.AnyPort = w.AnyPort
	}
	if sc.Apps, err = c.apps(); err != nil {
		return sc, err
	}
	for _, g := range c.Inbound.GatewaysOnly {
		sc.GatewaysOnly = append(sc.GatewaysOnly, netip.MustParseAddr(g)) // checked by Validate
	}
	return sc, nil
}

func workloadIPs(c *Config) []netip.Addr {
	var ips []netip.Addr
	for _, w := range c.Workloads {
		ips = append(ips, netip.MustParseAddr(w.Address)) // checked by Validate
	}
	return ips
}

// endedOr is nil where err is only that ctx has ended.
func endedOr(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func given(s string) string {
	if s == none {
		return ""
	}
	return s
}

func ownID(src *identity.Source) string {
	svid, err := src.GetX509SVID()
	if err != nil {
		return ""
	}
	return svid.ID.String()
}

// openAccessLog returns nil for "none".
func openAccessLog(where string) (log io.Writer, closeLog func(), err error) {
	switch where {
	case none:
		return nil, func() {}, nil
	case "stdout":
		return os.Stdout, func() {}, nil
	}
	f, err := os.OpenFile(where, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("access log: %w", err)
	}
	return f, func() { _ = f.Close() }, nil
}

// tracing exports spans, or does nothing.
type tracing struct{ provider *sdktrace.TracerProvider }

func newTracing(ctx context.Context, c *Config, dial sidecar.Dial) (*tracing, error) {
	if c.OTLP.Endpoint == "" {
		return &tracing{}, nil
	}
	opts := []otlptracegrpc.Option{otlptracegrpc.WithEndpoint(c.OTLP.Endpoint)}
	opts = append(opts, otlptracegrpc.WithDialOption(grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dial(ctx, "tcp", addr) })))
	if c.OTLP.Insecure {
		opts = append(opts, otlptracegrpc.WithInsecure())
	}
	exporter, err := otlptracegrpc.New(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("otlp %s: %w", c.OTLP.Endpoint, err)
	}
	share := 1.0
	if c.OTLP.Sample != nil {
		share = *c.OTLP.Sample
	}
	return &tracing{sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter), sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(share))),
		sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", "hanse-proxy"), attribute.String("service.instance.id", c.NodeID), attribute.String("hanse.cluster", c.Cluster))),
	)}, nil
}

// run waits for ctx, then sends what is left.
func (t *tracing) run(ctx context.Context) error {
	<-ctx.Done()
	if t.provider == nil {
		return nil
	}
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	if err := t.provider.Shutdown(flush); err != nil {
		return fmt.Errorf("send the last spans: %w", err)
	}
	return nil
}

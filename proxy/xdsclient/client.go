package xdsclient

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
)

// Errors of Resolve, Service and ServiceAt.
var (
	ErrUnknown     = errors.New("the control plane knows no such service port")
	ErrTooMany     = errors.New("too many different names are in use")
	ErrUnavailable = errors.New("no answer from the control plane")
)

// Bounds and times.
const (
	maxNames     = 4096
	unknownFor   = 5 * time.Second
	sweepEvery   = time.Minute
	saveEvery    = time.Second // at most, and
	saveRate     = 1 << 20     // at most so many bytes a second
	minBackoff   = 100 * time.Millisecond
	maxBackoff   = 10 * time.Second
	firstAnswer  = 15 * time.Second // on a new stream
	defaultIdle  = 30 * time.Minute
	maxMessage   = 64 << 20 // bytes received
	defaultLoads = 5 * time.Second
	maxBurst     = 64 // responses
)

// Node is what this proxy says of itself. Who it is, is its SVID.
type Node struct {
	ID          string // unique per proxy
	Cluster     string
	Network     string
	Region      string
	Zone        string
	Namespace   string
	Role        string // sidecar, gateway or agent
	WorkloadIPs []netip.Addr
	Version     string
}

// Config is what New needs. Addrs, Source, ServerID and Node.ID are required.
type Config struct {
	Addrs    []string // host:port of the control plane's replicas; tried in turn
	Source   *identity.Source
	ServerID spiffeid.ID // of the control plane
	Node     Node
	StateDir string // where resources are kept, mode 0700; empty: nowhere

	Log        *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time // default time.Now
	IdleAfter  time.Duration    // names that nobody resolves are given up then; default 30 min

	// Dial opens a connection; default is net.Dialer's.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Trust loads bundles at least as new as the sequences, by trust domain. The control plane hears of it after nil was returned;
	// an error is tried again.
	Trust func(ctx context.Context, t Trust) error
	// OnTable is called with each new Table before Table returns it, never twice at the same time.
	OnTable func(*proxy.Table)
	// Load yields what is to be reported; nil: nothing is reported.
	Load Reporter
}

// Trust is what the control plane says that this proxy should trust.
type Trust struct {
	Sequences   map[string]uint64 // of the newest bundle, by trust domain
	Authorities map[string][]byte // identity.Digest of its X.509 authorities; absent from control planes of before
}

// Client follows the control plane. It is safe for concurrent use.
type Client struct {
	// read-only after New
	cfg   Config
	log   *slog.Logger
	now   func() time.Time
	idle  time.Duration
	owner string // of the kept state
	wake  chan struct{}

	hosts  hosts
	view   atomic.Pointer[view]
	status atomic.Pointer[Status]
	nacks  *prometheus.CounterVec

	mu     sync.Mutex
	wanted map[string]struct{} // guarded by mu; not yet seen by Run
	count  int                 // guarded by mu; names in use, with wanted

	reporting atomic.Int64 // interval that drills ask for, in ns; 0: none
}

// view is immutable but for the times in used.
type view struct {
	table   *proxy.Table
	used    map[string]*atomic.Int64 // names in use, with the Unix time in ns of the last Resolve
	failed  map[string]error         // names that exist and cannot be used
	changed chan struct{}            // closed when replaced
}

// Status is the client's own, for the admin port.
type Status struct {
	Connected  bool       `json:"connected"`
	Server     string     `json:"server,omitempty"`
	Since      time.Time  `json:"since"` // of Connected
	LastError  string     `json:"lastError,omitempty"`
	Received   time.Time  `json:"received"` // last response
	Version    uint64     `json:"version"`
	Names      int        `json:"names"`
	Hosts      int        `json:"hosts"` // host names and addresses
	Rejected   []Rejected `json:"rejected,omitempty"`
	TrustError string     `json:"trustError,omitempty"`
	Kept       bool       `json:"kept"` // what is in force comes from StateDir
}

// Rejected is a resource that did not decode; what was in force before still is.
type Rejected struct {
	Type  string    `json:"type"`
	Name  string    `json:"name"`
	Error string    `json:"error"`
	Since time.Time `json:"since"`
}

// New builds a Client. It says what is missing in cfg.
func New(cfg Config) (*Client, error) {
	switch {
	case len(cfg.Addrs) == 0:
		return nil, errors.New("xds client: no address of a control plane")
	case cfg.Source == nil || cfg.ServerID.IsZero():
		return nil, errors.New("xds client: needs a Source and the control plane's SPIFFE ID")
	case cfg.Node.ID == "":
		return nil, errors.New("xds client: the node needs an ID")
	}
	c := &Client{
		cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), now: cfg.Now, idle: cmp.Or(cfg.IdleAfter, defaultIdle),
		owner: cfg.Node.ID + " " + cfg.ServerID.String(), wake: make(chan struct{}, 1), wanted: map[string]struct{}{}, hosts: newHosts(),
	}
	if c.now == nil {
		c.now = time.Now
	}
	s := newStore(c.gateway(), c.inboundNames())
	c.view.Store(&view{table: s.table, changed: make(chan struct{})})
	c.status.Store(&Status{Since: c.now()})
	c.nacks = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "hanse_xds_client_nacks_total", Help: "xDS responses that this proxy rejected, by resource type."}, []string{"type"})
	if cfg.Registerer != nil {
		for _, m := range append(c.gauges(), c.nacks) {
			if err := cfg.Registerer.Register(m); err != nil {
				return nil, fmt.Errorf("xds client: register metrics: %w", err)
			}
		}
	}
	return c, nil
}

func (c *Client) gateway() bool { return c.cfg.Node.Role == "gateway" }

func (c *Client) inboundNames() []string {
	var out []string
	if c.cfg.Node.Role == "sidecar" {
		for _, ip := range c.cfg.Node.WorkloadIPs {
			out = append(out, inboundPrefix+ip.Unmap().String())
		}
	}
	return out
}

func (c *Client) gauges() []prometheus.Collector {
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	return []prometheus.Collector{
		gauge("hanse_xds_client_connected", "1 while the control plane answers.", func() float64 {
			if c.Status().Connected {
				return 1
			}
			return 0
		}),
		gauge("hanse_xds_client_table_version", "Number of the table in force.", func() float64 { return float64(c.Table().Version) }),
		gauge("hanse_xds_client_age_seconds", "Time since the control plane was connected; 0 while it is.", func() float64 {
			if s := c.Status(); !s.Connected {
				return c.now().Sub(s.Since).Seconds()
			}
			return 0
		}),
		gauge("hanse_xds_client_names", "Service ports that are followed.", func() float64 { return float64(c.Status().Names) }),
		gauge("hanse_xds_client_hosts", "Host names and addresses that are followed.", func() float64 { return float64(c.hosts.count()) }),
		gauge("hanse_xds_client_rejected", "Resources whose newest version was rejected.", func() float64 { return float64(len(c.Status().Rejected)) }),
	}
}

// Table returns the Table in force. It is never nil.
func (c *Client) Table() *proxy.Table { return c.view.Load().table }

// Changed returns a channel that is closed when there is something new to see by Table or Resolve. Take it before reading.
func (c *Client) Changed() <-chan struct{} { return c.view.Load().changed }

// Status returns the client's own state. It must not be changed.
func (c *Client) Status() *Status { return c.status.Load() }

// Resolve returns the Listener of an authority, and asks the control plane for it where this proxy does not follow it yet. It waits
// until the Listener and all that it leads to are known, or ctx ends (ErrUnavailable). ErrUnknown is remembered for 5 s. The
// common path takes no lock. A gateway resolves nothing.
func (c *Client) Resolve(ctx context.Context, authority string) (*proxy.Listener, error) {
	if authority == "" || len(authority) > maxName || strings.HasPrefix(authority, "hanse/") || authority == "*" {
		return nil, fmt.Errorf("resolve %q: %w", shorten(authority), ErrUnknown)
	}
	for {
		v := c.view.Load()
		now := c.now()
		if used := v.used[authority]; used != nil {
			if at := now.UnixNano(); at-used.Load() > int64(time.Second) { // else leave the cache line alone
				used.Store(at)
			}
			if l := v.table.Listeners[authority]; l != nil {
				return l, nil
			}
			if err := v.failed[authority]; err != nil {
				return nil, fmt.Errorf("resolve %s: %w", authority, err)
			}
		} else {
			if at, ok := v.table.Unknown[authority]; ok && now.Sub(at) < unknownFor {
				return nil, fmt.Errorf("resolve %s: %w", authority, ErrUnknown)
			}
			if err := c.want(authority); err != nil {
				return nil, fmt.Errorf("resolve %s: %w", authority, err)
			}
		}
		select {
		case <-v.changed:
		case <-ctx.Done():
			return nil, c.unavailable("resolve "+authority, ctx.Err())
		}
	}
}

// want hands a name to Run.
func (c *Client) want(authority string) error {
	if c.gateway() {
		return ErrUnknown
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.wanted[authority]; ok {
		return nil
	}
	if c.count >= maxNames {
		return ErrTooMany
	}
	c.wanted[authority] = struct{}{}
	c.count++
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return nil
}

// Run follows the control plane until ctx ends, and has ended all it started then.
func (c *Client) Run(ctx context.Context) error {
	r := &run{Client: c, store: newStore(c.gateway(), c.inboundNames()), events: make(chan event, maxBurst)}
	if err := r.restore(); err != nil {
		return err
	}
	return r.loop(ctx)
}

// run is the state of one Run; all of it is owned by its loop.
type run struct {
	*Client
	store *store

	events  chan event // of the connection
	stream  *stream    // nil: not connected
	lastErr string
	kept    bool // nothing has come from the control plane yet

	trustCancel context.CancelFunc
	trustFor    *discoveryv3.DeltaDiscoveryResponse // that trustCancel ends the load of
	trustErr    string
	saving      bool
	nextSave    time.Time
	saveFailed  bool
}

// restore begins with what StateDir holds.
func (r *run) restore() error {
	dir := r.cfg.StateDir
	if dir != "" {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("xds client: state directory: %w", err)
		}
		kept, err := load(dir, r.owner)
		if err != nil {
			r.log.Warn("kept xDS state is not used", "error", err)
		}
		if err := r.store.restore(kept, r.now()); err != nil {
			r.log.Warn("part of the kept xDS state is not used", "error", err)
		}
		r.kept = len(kept) > 0
	}
	r.publish()
	return nil
}

// loop waits for what happens and tells the store.
func (r *run) loop(ctx context.Context) error {
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer running.Wait()
	defer cancel()
	running.Go(func() { r.connections(ctx) })
	loaded := make(chan trustResult)
	kept := make(chan saveResult, 1)
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	save := time.NewTimer(0)
	defer save.Stop()
	for {
		select {
		case <-ctx.Done():
			if r.saving {
				r.saved(<-kept)
			}
			if messages := r.unsaved(); messages != nil {
				r.saved(r.write(messages))
			}
			return nil
		case <-r.wake:
			r.takeWanted()
			r.takeHosts()
		case e := <-r.events:
			r.handle(ctx, e, loaded, &running)
			for more := 0; more < maxBurst; more++ { // what has come together is one Table
				select {
				case e := <-r.events:
					r.handle(ctx, e, loaded, &running)
					continue
				default:
				}
				break
			}
		case res := <-loaded:
			r.trustLoaded(res)
		case <-sweep.C:
			r.sweep()
		case <-save.C:
			if messages := r.unsaved(); messages != nil {
				r.saving = true
				running.Go(func() { kept <- r.write(messages) })
			}
		case res := <-kept:
			r.saved(res)
		}
		r.publish()
		if r.cfg.StateDir != "" && !r.store.saved && !r.saving {
			save.Reset(max(0, r.nextSave.Sub(r.now())))
		}
	}
}

func (r *run) takeWanted() {
	r.mu.Lock()
	fresh := r.wanted
	r.wanted = map[string]struct{}{}
	r.mu.Unlock()
	for n := range fresh {
		if _, ok := r.store.unknown[n]; ok && r.now().Sub(r.store.unknown[n]) < unknownFor {
			continue // answered while this was on its way
		}
		r.store.want(n)
	}
}

// sweep gives up names that nobody has resolved for a while.
func (r *run) sweep() {
	now := r.now()
	r.sweepHosts(now)
	r.store.expire(now.Add(-unknownFor))
	for n, used := range r.view.Load().used {
		if now.Sub(time.Unix(0, used.Load())) > r.idle {
			r.store.forget(n)
		}
	}
}

// publish shows what is new, and sends what follows from it.
func (r *run) publish() {
	now := r.now()
	r.publishHosts(now)
	table, requests := r.store.next(now)
	r.send(requests...)
	old := r.view.Load()
	v := &view{table: cmp.Or(table, old.table), used: old.used, failed: map[string]error{}, changed: make(chan struct{})}
	renamed := r.store.renamed
	if r.store.renamed = false; renamed {
		v.used = make(map[string]*atomic.Int64, len(r.store.names))
		for n := range r.store.names {
			if v.used[n] = old.used[n]; v.used[n] == nil {
				v.used[n] = &atomic.Int64{}
				v.used[n].Store(now.UnixNano())
			}
		}
	}
	for n := range r.store.kinds[listeners].rejected {
		if err := r.store.failure(n); err != nil {
			v.failed[n] = err
		}
	}
	r.mu.Lock()
	r.count = len(r.store.names) + len(r.wanted)
	r.mu.Unlock()
	if table != nil {
		r.reporting.Store(int64(reportInterval(table.Faults, now)))
		if r.cfg.OnTable != nil {
			r.cfg.OnTable(table)
		}
	}
	r.publishStatus(v)
	if table == nil && !renamed && sameKeys(old.failed, v.failed) {
		return
	}
	r.view.Store(v)
	close(old.changed)
}

func sameKeys(a, b map[string]error) bool {
	if len(a) != len(b) {
		return false
	}
	for k := range a {
		if _, ok := b[k]; !ok {
			return false
		}
	}
	return true
}

func (r *run) publishStatus(v *view) {
	old := r.status.Load()
	s := &Status{
		Since: old.Since, Received: old.Received, LastError: r.lastErr, Version: v.table.Version, Names: len(v.used), Hosts: r.hosts.count(), TrustError: r.trustErr, Kept: r.kept,
	}
	if r.stream != nil {
		s.Connected, s.Server, s.Received = r.stream.answered, r.stream.addr, r.stream.received
	}
	if s.Received.IsZero() {
		s.Received = old.Received
	}
	if s.Connected != old.Connected {
		s.Since = r.now()
	}
	for _, k := range r.store.kinds {
		for n, rej := range k.rejected {
			s.Rejected = append(s.Rejected, Rejected{Type: shortType(k.url), Name: n, Error: rej.err.Error(), Since: rej.since})
		}
	}
	slices.SortFunc(s.Rejected, func(a, b Rejected) int { return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name)) })
	r.status.Store(s)
}

// saveResult is the end of writing the state file.
type saveResult struct {
	size int
	err  error
}

// unsaved is what is to be kept and has not been; nil: nothing.
func (r *run) unsaved() []proto.Message {
	if r.cfg.StateDir == "" || r.saving {
		return nil
	}
	return r.store.snapshot(r.owner)
}

func (r *run) write(messages []proto.Message) saveResult {
	size, err := save(r.cfg.StateDir, messages)
	return saveResult{size, err}
}

// saved notes how that went. A disk that is full is told once, and tried again with the next change.
func (r *run) saved(res saveResult) {
	r.saving = false
	r.nextSave = r.now().Add(max(saveEvery, time.Duration(res.size)*time.Second/saveRate))
	switch {
	case res.err != nil && !r.saveFailed:
		r.log.Warn("xDS state is not kept: a restart will need the control plane", "error", res.err)
	case res.err == nil && r.saveFailed:
		r.log.Info("xDS state is kept again")
	}
	r.saveFailed = res.err != nil
}

// node is the xDS Node of the first request on a stream.
func (c *Client) node() *corev3.Node {
	n := c.cfg.Node
	ips := make([]*structpb.Value, len(n.WorkloadIPs))
	for i, ip := range n.WorkloadIPs {
		ips[i] = structpb.NewStringValue(ip.Unmap().String())
	}
	text := structpb.NewStringValue
	return &corev3.Node{
		Id: n.ID, Cluster: n.Cluster, Locality: &corev3.Locality{Region: n.Region, Zone: n.Zone},
		UserAgentName: "hanse-proxy", UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: n.Version},
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"cluster": text(n.Cluster), "network": text(n.Network), "namespace": text(n.Namespace), "role": text(n.Role),
			"workload_ips": structpb.NewListValue(&structpb.ListValue{Values: ips}), "version": text(n.Version),
		}},
	}
}

// jitter spreads d over [d/2, d).
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2) }

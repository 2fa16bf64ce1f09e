package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// Bounds.
const (
	maxQueries    = 1024 // at the same time
	maxConns      = 128  // over TCP
	maxPerConn    = 1000 // queries
	meshTimeout   = 2 * time.Second
	shortTimeout  = 500 * time.Millisecond
	idleTimeout   = 10 * time.Second
	maxUDP        = 4096 // bytes of an answer, where the client has room for them
	advertisedUDP = 1232
)

// Config of a Server. Control and Pool are required. The Server closes the listeners.
type Config struct {
	UDP []net.PacketConn
	TCP []net.Listener

	Control   Control
	Pool      *Pool
	Fixed     map[string][]netip.Addr // services by host that have an address of their own here
	NoAssign  bool                    // nothing takes connections to the Pool's addresses: hand out none
	Namespace string                  // of the workload, where short names mean the mesh; else empty
	StateFile string                  // where the Pool is kept; empty: nowhere

	Upstreams []netip.AddrPort
	Resolvers func() ([]netip.AddrPort, error)                                     // if given, asked every few seconds for what the upstreams are now; an error leaves them as they are
	Timeout   time.Duration                                                        // of one try at one upstream; default 1 s
	Dial      func(ctx context.Context, network, address string) (net.Conn, error) // default is net.Dialer's

	Log        *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time // default time.Now
}

// Server answers DNS.
type Server struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	forward *forwarder
	queries chan struct{} // a slot each

	route6   atomic.Bool
	route6At atomic.Int64 // Unix seconds of the last look
}

// New builds a Server, and takes what StateFile holds into the Pool.
func New(cfg Config) (*Server, error) {
	if cfg.Control == nil || cfg.Pool == nil {
		return nil, errors.New("dns: needs a Control and a Pool")
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, time.Second)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	s := &Server{cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), queries: make(chan struct{}, maxQueries)}
	var err error
	if s.metrics, err = newMetrics(cfg.Registerer, cfg.Pool); err != nil {
		return nil, fmt.Errorf("dns: register metrics: %w", err)
	}
	if cfg.StateFile != "" {
		if err := cfg.Pool.load(cfg.StateFile); err != nil {
			s.log.Warn("the kept addresses of DNS are not used: names get new ones", "error", err)
		}
	}
	s.forward = newForwarder(&s.cfg, s.log, s.metrics)
	return s, nil
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	var servers []*dns.Server
	for _, pc := range s.cfg.UDP {
		servers = append(servers, &dns.Server{PacketConn: pc, UDPSize: maxUDP})
	}
	for _, ln := range s.cfg.TCP {
		servers = append(servers, &dns.Server{Listener: &limited{Listener: ln, slots: make(chan struct{}, maxConns), metrics: s.metrics}, MaxTCPQueries: maxPerConn,
			IdleTimeout: func() time.Duration { return idleTimeout }})
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	if s.cfg.StateFile != "" {
		running.Go(func() { s.keep(ctx) })
	}
	if s.cfg.Resolvers != nil {
		running.Go(func() { s.forward.watch(ctx) })
	}
	for _, srv := range servers {
		srv.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) { s.serve(ctx, w, r) })
		srv.MsgInvalidFunc = func([]byte, error) { s.metrics.dropped.WithLabelValues("malformed").Inc() }
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		running.Go(func() {
			if err := srv.ActivateAndServe(); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("dns: serve: %w", err))
			}
		})
		running.Go(func() {
			<-ctx.Done()
			select {
			case <-started:
			case <-time.After(time.Second):
			}
			late, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer stop()
			_ = srv.ShutdownContext(late)
		})
	}
	<-ctx.Done()
	running.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	return nil
}

// serve answers one query.
func (s *Server) serve(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) {
	select {
	case s.queries <- struct{}{}:
		defer func() { <-s.queries }()
	default:
		s.metrics.dropped.WithLabelValues("overloaded").Inc()
		return // the client asks again
	}
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	if s.forward.isOwn(w.RemoteAddr()) {
		s.metrics.dropped.WithLabelValues("loop").Inc()
		s.forward.warnOfLoop()
		s.reply(w, r, &answer{code: dns.RcodeRefused}, tcp, "refused")
		return
	}
	if code, bad := fault(r); bad {
		s.reply(w, r, &answer{code: code}, tcp, "refused")
		return
	}
	q := r.Question[0]
	name := strings.ToLower(q.Name)
	if strings.ContainsRune(name, '\\') { // bytes that no name of ours has
		s.forwarded(ctx, w, r, tcp)
		return
	}
	if address, ok := reverse(name); ok {
		if _, _, ours := s.cfg.Pool.At(address); ours {
			a := s.reversed(address, q.Name, q.Qtype)
			s.reply(w, r, &a, tcp, "mesh")
			return
		}
	}
	asked := parse(name, s.cfg.Namespace)
	if asked.kind == foreign {
		s.forwarded(ctx, w, r, tcp)
		return
	}
	timeout := meshTimeout
	if asked.short { // most likely none of ours
		timeout = shortTimeout
	}
	limit, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	a, err := s.mesh(limit, asked, q.Name, q.Qtype)
	if err != nil {
		s.forwarded(ctx, w, r, tcp)
		return
	}
	s.reply(w, r, &a, tcp, "mesh")
}

// fault says what is wrong with a query that is answered by nobody.
func fault(r *dns.Msg) (code int, bad bool) {
	opts := 0
	for _, rr := range r.Extra {
		if rr.Header().Rrtype == dns.TypeOPT {
			opts++
		}
	}
	switch {
	case r.Opcode != dns.OpcodeQuery:
		return dns.RcodeNotImplemented, true
	case len(r.Question) != 1 || opts > 1: // RFC 6891 §6.1.1
		return dns.RcodeFormatError, true
	case opts == 1 && r.IsEdns0().Version() != 0:
		return dns.RcodeBadVers, true
	}
	switch q := r.Question[0]; {
	case q.Qclass != dns.ClassINET:
		return dns.RcodeRefused, true
	case q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR || q.Qtype == dns.TypeOPT || q.Qtype == dns.TypeTSIG:
		return dns.RcodeRefused, true
	}
	return 0, false
}

// reply sends an answer of our own.
func (s *Server) reply(w dns.ResponseWriter, r *dns.Msg, a *answer, tcp bool, by string) {
	m := new(dns.Msg)
	m.SetReply(r)
	m.RecursionAvailable = true
	m.Authoritative = by == "mesh" && a.code != dns.RcodeServerFailure
	m.Answer, m.Extra, m.Rcode = a.records, a.extra, a.code
	if a.soa != "" && len(a.records) == 0 {
		m.Ns = []dns.RR{soa(a.soa)}
	}
	size := dns.MinMsgSize
	if opt := r.IsEdns0(); opt != nil {
		size = int(min(max(opt.UDPSize(), dns.MinMsgSize), maxUDP))
		m.SetEdns0(advertisedUDP, opt.Do())
	}
	if tcp {
		size = dns.MaxMsgSize
	}
	m.Compress = true
	m.Truncate(size)
	s.metrics.queries.WithLabelValues(by, rcode(a.code)).Inc()
	if err := w.WriteMsg(m); err != nil {
		s.log.Debug("dns: send an answer", "to", w.RemoteAddr(), "error", err)
	}
}

// forwarded passes a query on to the upstream resolvers, and their answer back.
func (s *Server) forwarded(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, tcp bool) {
	raw, err := s.forward.ask(ctx, r, tcp)
	if err != nil {
		s.log.Debug("dns: no upstream answers", "name", r.Question[0].Name, "error", err)
		s.reply(w, r, &failed, tcp, "upstream")
		return
	}
	s.metrics.queries.WithLabelValues("upstream", rcode(int(raw[3]&0xf))).Inc()
	if _, err := w.Write(raw); err != nil {
		s.log.Debug("dns: send an answer", "to", w.RemoteAddr(), "error", err)
	}
}

func rcode(code int) string {
	if s, ok := dns.RcodeToString[code]; ok {
		return s
	}
	return "other"
}

// reaches6 reports whether there is a route to the Pool's IPv6 addresses: without one they would be no use, and slow. It looks again
// every few seconds; nothing is sent.
func (s *Server) reaches6() bool {
	now := s.cfg.Now().Unix()
	if last := s.route6At.Load(); now-last >= 5 && s.route6At.CompareAndSwap(last, now) {
		_, v6 := s.cfg.Pool.addresses(1)
		c, err := net.Dial("udp6", netip.AddrPortFrom(v6, 9).String())
		if err == nil {
			_ = c.Close()
		}
		s.route6.Store(err == nil)
	}
	return s.route6.Load()
}

// limited bounds the connections of a listener.
type limited struct {
	net.Listener
	slots   chan struct{}
	metrics *metrics
}

// Accept implements net.Listener. A connection too many is closed.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &slotConn{Conn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			l.metrics.dropped.WithLabelValues("connections").Inc()
			_ = c.Close()
		}
	}
}

type slotConn struct {
	net.Conn
	free func()
}

func (c *slotConn) Close() error {
	c.free()
	return c.Conn.Close()
}

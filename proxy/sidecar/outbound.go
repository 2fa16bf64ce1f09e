package sidecar

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/xdsclient"
)

const (
	resolveTimeout = 5 * time.Second
	maxConnTries   = 5 // tries of one request where nothing reached the application
	maxLostRetries = 2 // further tries of an idempotent request after it was lost on the way, unless the route says more
	maxMirrors     = 64
)

// outbound serves one exchange of the application. fixed is the authority of a local listener, or "" on the explicit proxy.
func (s *Sidecar) outbound(st message.ServerStream, fixed string, h2 bool) {
	r := st.Request()
	rec := s.begin(reporterSource, requestProtocol(r, h2))
	defer s.finish(rec)
	rec.source = s.ownID()
	rec.method = r.Method
	rec.path, _, _ = strings.Cut(r.Path, "?")
	authority, err := fixed, error(nil)
	if fixed == "" {
		port := uint16(80)
		if r.Method == http.MethodConnect {
			port = 443
		}
		authority, err = s.names.authorityOf(r.Authority, s.cfg.Namespace, port)
	}
	rec.service = authority
	if err != nil {
		s.refuse(st, rec, failWith(codeUnknownService, "%v", err))
		return
	}
	table, listener, f := s.resolve(authority)
	if f != nil {
		s.refuse(st, rec, f)
		return
	}
	switch {
	case r.Method == http.MethodConnect:
		s.tunnel(st, rec, table, listener)
	case listener.Protocol == proxy.TCP:
		s.refuse(st, rec, failWith(codeBadRequest, "%s is a TCP service: use CONNECT", authority))
	default:
		s.serveHTTP(st, rec, table, listener, fixed != "")
	}
}

func requestProtocol(r *message.Request, h2 bool) string {
	switch {
	case r.Method == http.MethodConnect:
		return "tcp"
	case r.Protocol != "":
		return "upgrade"
	case isGRPC(r.Fields):
		return "grpc"
	case h2:
		return "http2"
	}
	return "http"
}

func (s *Sidecar) refuse(st message.ServerStream, rec *record, f *failure) {
	s.refuseWith(st, rec, f, nil)
}

// refuseWith adds fields to the answer.
func (s *Sidecar) refuseWith(st message.ServerStream, rec *record, f *failure, extra message.Fields) {
	rec.fail(f)
	if isGRPC(st.Request().Fields) {
		rec.grpc = strconv.Itoa(int(f.grpc))
	}
	f.write(st, extra, rec.reporter == reporterDestination)
}

// resolve returns the Listener of an authority and the Table that it is in, asking the control plane where it is not known yet.
func (s *Sidecar) resolve(authority string) (*proxy.Table, *proxy.Listener, *failure) {
	listener, err := s.cfg.Control.Resolve(instantly, authority)
	if errors.Is(err, xdsclient.ErrUnavailable) { // not at hand: it takes a while
		ctx, cancel := context.WithTimeout(s.coreCtx, resolveTimeout)
		defer cancel()
		listener, err = s.cfg.Control.Resolve(ctx, authority)
	}
	switch {
	case errors.Is(err, xdsclient.ErrUnknown):
		return nil, nil, failWith(codeUnknownService, "no service %s in this clusterset, or none that this workload may see", authority)
	case err != nil:
		return nil, nil, failWith(codeNoConfig, "%v", err)
	}
	table := s.cfg.Control.Table()
	s.apply(table)
	return table, listener, nil
}

// instantly has ended: what takes it does not wait.
var instantly = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// serveHTTP serves one request.
func (s *Sidecar) serveHTTP(st message.ServerStream, rec *record, table *proxy.Table, l *proxy.Listener, local bool) {
	t := transfers.Get().(*transfer)
	t.s, t.st, t.rec, t.table, t.out = s, st, rec, table, *st.Request()
	t.serve(l, local)
	if !t.spoilt {
		*t = transfer{abort: t.abort, informed: t.informed, header: t.header}
		transfers.Put(t)
	}
}

// serve routes one request.
func (t *transfer) serve(l *proxy.Listener, local bool) {
	s, st, rec := t.s, t.st, t.rec
	out := &t.out
	out.Scheme = "https"
	if local {
		out.Authority = l.Authority // 127.0.0.1:9001 means nothing to anybody else
	}
	stripOwn(&out.Fields)
	s.trace(rec, &out.Fields, trace.SpanKindClient)
	_, query, _ := strings.Cut(out.Path, "?")
	route := l.Match(&proxy.Request{Method: out.Method, Path: rec.path, RawQuery: query, Header: t.header})
	if route == nil {
		s.refuse(st, rec, failWith(codeNoRoute, "no route of %s matches %s %s", l.Authority, out.Method, rec.path))
		return
	}
	rec.route = route.Name
	if d := route.Redirect; d != nil {
		fields := message.Fields{{Name: "location", Value: d.Location(&route.Match, "http", out.Authority, rec.path, query)}}
		edit(&route.Response, &fields, nil)
		rec.status = d.Status
		_ = st.Respond(&message.Response{Status: d.Status, Fields: fields}, true)
		return
	}
	backend := route.Pick(rand.Uint64())
	status := route.DirectStatus
	if status == 0 && backend != nil {
		status = backend.DirectStatus
	}
	if status != 0 || backend == nil {
		f := failWith(codeNoBackend, "%s has no valid backend", route.Name)
		if status != 0 {
			f.status = status
		}
		s.refuse(st, rec, f)
		return
	}
	t.route, t.backend = route, backend
	edit(&route.Request, &out.Fields, &out.Authority)
	edit(&backend.Request, &out.Fields, &out.Authority)
	rewrite := route.RewriteOf(backend)
	if rewrite.Host != "" {
		out.Authority = rewrite.Host
	}
	if p := rewrite.Path(&route.Match, rec.path); p != rec.path {
		if i := strings.IndexByte(out.Path, '?'); i >= 0 {
			p += out.Path[i:]
		}
		out.Path = p
	}
	out.Fields.Set(headerTarget, backend.Cluster)
	if out.Protocol != "" {
		t.upgrade()
		return
	}
	if out.Length != 0 {
		t.body = newReplay(st)
	}
	if route.Mirror != nil {
		s.mirror(route.Mirror, out, t.body)
	}
	t.run()
}

var (
	errRequestTimeout = errors.New("the route's request timeout")
	errTryTimeout     = errors.New("the route's timeout for one try")
	errCallerGone     = errors.New("the caller went away")
)

// transfer is one request on its way to one of several endpoints.
type transfer struct {
	s       *Sidecar
	st      message.ServerStream
	rec     *record
	table   *proxy.Table
	route   *proxy.Route
	backend *proxy.Backend
	out     message.Request // as it leaves
	body    *replay         // nil: none

	tried    [4]string // backs triedIDs
	triedIDs []string
	retries  int  // that may have reached the application
	silent   bool // a try met silence

	abort    func(error) // these three are made once, of methods
	informed func(status int, fields message.Fields)
	header   func(name string) (string, bool)
	spoilt   bool // somebody may still call cancel, or look at this as a context: it is not used again

	mu      sync.Mutex
	ended   error                // guarded by mu: why the whole request has ended early
	current message.ClientStream // guarded by mu: what is to be cancelled then
	expired chan struct{}        // closed with ended; nil where nobody waits
}

// transfers are reused: whoever could still call cancel has returned when serve has.
var transfers = sync.Pool{New: func() any {
	t := &transfer{}
	t.abort, t.informed, t.header = func(error) { t.cancel(errCallerGone) }, t.inform, t.field
	return t
}}

// field is what routes match on.
func (t *transfer) field(name string) (string, bool) {
	if name == "host" {
		return t.out.Authority, true
	}
	return t.out.Fields.Joined(name)
}

// attempt is one try.
type attempt struct {
	pick    balance.Pick
	up      message.ClientStream
	resp    *message.Response
	body    sending
	started time.Time
	result  balance.Result
	failure *failure // resp is nil then
	retry   bool     // the policy would try again

	answered time.Time // when resp came

	brokeOff bool // the application took the request and ended without an answer
	safe     bool // nothing reached the application
	silent   bool // nothing came back, not even a refusal
}

// cancel ends the request early, whatever it is doing.
func (t *transfer) cancel(why error) {
	t.mu.Lock()
	if t.ended == nil {
		t.ended = why
		if t.expired != nil {
			close(t.expired)
		}
	}
	current := t.current
	t.mu.Unlock()
	if current != nil {
		current.Cancel(why)
	}
}

// why is the reason of an early end, or nil.
func (t *transfer) why() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ended
}

// watch sets what cancel is to cancel.
func (t *transfer) watch(up message.ClientStream) {
	t.mu.Lock()
	t.current = up
	ended := t.ended
	t.mu.Unlock()
	if ended != nil && up != nil {
		up.Cancel(ended)
	}
}

func (t *transfer) run() {
	t.st.OnAbort(t.abort)
	if d := t.route.RequestTimeout; d > 0 {
		timer := time.AfterFunc(d, func() { t.cancel(errRequestTimeout) })
		defer func() { t.spoilt = !timer.Stop() || t.spoilt }()
	}
	a := t.try(false, nil)
	for a.retry && t.wait(&a) {
		a.result.Retried = true
		next, ok := t.again(&a)
		if !ok {
			break
		}
		a = next
	}
	t.finish(&a)
}

// wait is the route's backoff before a try of what may have reached the application. It is false if the time is up, or the body gone.
func (t *transfer) wait(a *attempt) bool {
	if t.why() != nil || t.body != nil && !t.body.replayable() {
		return false
	}
	if a.safe || t.route.Retry.Backoff <= 0 {
		return true
	}
	// Full jitter, doubling.
	timer := time.NewTimer(rand.N(t.route.Retry.Backoff << min(t.retries, 6)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-t.Done():
		return false
	}
}

// A transfer is the context of its own connecting: it ends with cancel.
var _ context.Context = (*transfer)(nil)

// Done implements context.Context, as do the others.
func (t *transfer) Done() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.spoilt {
		t.spoilt = true // somebody may still look
	}
	if t.expired == nil {
		t.expired = make(chan struct{})
		if t.ended != nil {
			close(t.expired)
		}
	}
	return t.expired
}

func (t *transfer) Err() error {
	if t.why() != nil {
		return context.Canceled
	}
	return nil
}

func (t *transfer) Deadline() (time.Time, bool) { return time.Time{}, false }
func (t *transfer) Value(any) any               { return nil }

// again makes a further try. It is false if the retry budget or the endpoints are used up: the answer of before stands then.
func (t *transfer) again(before *attempt) (attempt, bool) {
	if !before.safe {
		t.retries++
	}
	if before.silent {
		t.silent = true
		before.pick.Doubt(before.result.Outcome)
	}
	// A peer or an application that died takes all its calls at once. Trying them elsewhere once is no storm, and must not be cut short
	// by the budget.
	died := before.result.Outcome == balance.Dead || before.brokeOff && t.retries == 1
	// What the last try has shown is told as soon as another endpoint is found, not when that one has answered: others must not
	// wait for the same dead endpoint meanwhile.
	a := t.try(!before.safe && !died, func() { t.end(before) })
	if a.failure != nil && a.pick.Endpoint == nil {
		before.result.Retried = false
		return a, false
	}
	return a, true
}

// end gives up an attempt that is over, or whose answer is not used.
func (t *transfer) end(a *attempt) {
	if a.up != nil {
		t.watch(nil)
		a.body.stop(a.up)
		a.up.Close()
		a.up = nil
	}
	a.pick.Done(a.result)
}

// try sends the request to one endpoint and waits for the head of the answer. picked, if not nil, is called once there is an endpoint.
func (t *transfer) try(counts bool, picked func()) attempt {
	info := balance.PickInfo{Exclude: t.triedIDs, Only: t.rec.only, Retry: counts, Silent: t.silent}
	if c := t.table.Clusters[t.backend.Cluster]; c != nil && c.HashHeader != "" {
		if v := t.out.Fields.Value(c.HashHeader); v != "" {
			info.Hash = balance.Hash(v)
		}
	}
	pick, f := t.s.pick(t.backend.Cluster, info)
	if f != nil {
		return attempt{failure: f}
	}
	if picked != nil {
		picked()
	}
	if t.triedIDs == nil {
		t.triedIDs = t.tried[:0]
	}
	t.triedIDs = append(t.triedIDs, pick.Endpoint.ID)
	t.rec.tries++
	a := attempt{pick: pick, started: time.Now()}
	up, err := t.s.openTo(t, t.backend.Cluster, pick, &t.out, message.Options{End: t.body == nil, Inform: t.informed})
	if err != nil {
		t.classify(&a, err)
		return a
	}
	a.up = up
	t.watch(up)
	if t.route.TryTimeout > 0 {
		timer := time.AfterFunc(t.route.TryTimeout, func() { up.Cancel(errTryTimeout) })
		defer timer.Stop()
	}
	if t.body != nil {
		ok := false
		if a.body, ok = t.body.send(up); !ok {
			a.result.Outcome = balance.Canceled
			a.failure = failWith(codeLost, "the body cannot be sent again")
			return a
		}
	}
	resp, err := up.Response()
	if err != nil {
		t.classify(&a, err)
		return a
	}
	a.resp = resp
	t.judge(&a)
	return a
}

// inform passes 103 and the like on.
func (t *transfer) inform(status int, fields message.Fields) { _ = t.st.Inform(status, fields) }

// pick chooses an endpoint.
func (s *Sidecar) pick(cluster string, info balance.PickInfo) (balance.Pick, *failure) {
	pick, err := s.balancer.Pick(cluster, info)
	switch {
	case err == nil:
		return pick, nil
	case errors.Is(err, balance.ErrOverloaded), errors.Is(err, balance.ErrRetryBudget):
		return pick, failWith(codeOverloaded, "%s: %v", cluster, err)
	default:
		return pick, failWith(codeNoEndpoint, "%s: %v", cluster, err)
	}
}

// openTo begins an exchange with the picked endpoint. ctx bounds connecting only.
func (s *Sidecar) openTo(ctx context.Context, cluster string, pick balance.Pick, r *message.Request, o message.Options) (message.ClientStream, error) {
	c := s.cfg.Control.Table().Clusters[cluster]
	if pick.Endpoint.Transport == proxy.TransportPlaintext {
		return s.plaintext.open(ctx, pick.Endpoint, c, r, o)
	}
	if pick.Endpoint.Transport != proxy.TransportHop && len(r.Fields) > 0 { // somebody else's sidecar: our fields mean nothing there
		out := *r
		out.Fields = append(message.Fields(nil), r.Fields...)
		stripOwn(&out.Fields)
		r = &out
	}
	peer, err := peerOf(pick.Endpoint)
	if err != nil {
		return nil, err
	}
	peer.Gateway = pick.Gateway
	if c != nil {
		peer.ConnectTimeout = c.ConnectTimeout
	}
	return s.hop.Open(ctx, peer, r, o)
}

// peerOf refuses endpoints without mTLS.
func peerOf(e *proxy.Endpoint) (hop.Peer, error) {
	peer := hop.Peer{ID: e.ID, Address: e.Address, SNI: e.SNI, SPIFFEID: e.SPIFFEID}
	if e.Transport == proxy.TransportPlaintext {
		return peer, &hop.Error{Peer: e.SPIFFEID, Address: e.Address, Stage: hop.StageConnect, Err: errors.New("endpoint has no mTLS")}
	}
	return peer, nil
}

// outcomeOf says whose failure an error of the hop is.
func outcomeOf(err error) balance.Outcome {
	var e *hop.Error
	if !errors.As(err, &e) {
		return balance.Reset
	}
	switch {
	case e.Stage == hop.StageGateway:
		return balance.GatewayFailed
	case e.Stage == hop.StageConnect, e.Stage == hop.StageHandshake:
		return balance.ConnectFailed
	case errors.Is(err, hop.ErrDead), errors.Is(err, hop.ErrLost), errors.Is(err, hop.ErrDistrusted):
		return balance.Dead
	case !e.Sent:
		return balance.Refused
	}
	return balance.Reset
}

// classify turns a failed try into what is answered and whether it is tried again.
func (t *transfer) classify(a *attempt, err error) {
	ended := t.why()
	var caller *callerError
	switch {
	case errors.Is(err, errTryTimeout) && ended == nil:
		a.result = balance.Result{Outcome: balance.TimedOut, Reason: errTryTimeout.Error()}
		a.failure = failWith(codeTimeout, "%s gave no answer within %s", a.pick.Endpoint.ID, t.route.TryTimeout)
		a.retry = t.mayRetryLost()
	case errors.Is(ended, errRequestTimeout):
		a.result = balance.Result{Outcome: balance.TimedOut, Reason: ended.Error()}
		a.failure = failWith(codeTimeout, "no answer within %s", t.route.RequestTimeout)
	case ended != nil:
		a.result = balance.Result{Outcome: balance.Canceled}
		a.failure = failWith(codeCanceled, "the caller went away")
	case errors.As(err, &caller):
		a.result = balance.Result{Outcome: balance.Canceled}
		a.failure = failWith(codeBadRequest, "the request's body: %v", caller)
	default:
		a.result = balance.Result{Outcome: outcomeOf(err), Reason: err.Error()}
		a.silent = hop.Silent(err)
		if a.safe = !hop.Sent(err); a.safe {
			a.failure = failWith(codeUnreachable, "%v", err)
			a.retry = len(t.triedIDs) < maxConnTries
		} else {
			a.failure = failWith(codeLost, "%v", err)
			a.retry = t.mayRetryLost()
		}
	}
}

// judge decides on an answer.
func (t *transfer) judge(a *attempt) {
	a.answered = time.Now()
	a.result = balance.Result{Outcome: balance.Responded, Status: a.resp.Status, Latency: a.answered.Sub(a.started)}
	if a.resp.Status == http.StatusOK && t.rec.protocol != "grpc" {
		return // no field of ours comes with it
	}
	fields := a.resp.Fields
	grpc := fields.Value("grpc-status") // Trailers-Only; with a body the status comes too late to try again
	if grpc != "" {
		if n, err := strconv.Atoi(grpc); err == nil {
			a.result.GRPC = n
		}
	}
	if fields.Value(headerUnprocessed) == "true" {
		a.safe = true
		a.result.Outcome, a.result.Reason = balance.Refused, fields.Value(headerError)
		a.retry = len(t.triedIDs) < maxConnTries
		return
	}
	if fields.Value(headerError) == codeAppFailed { // the far sidecar's word: the application took the request and broke off
		a.result.Reason, a.brokeOff = "the application broke off", true
		a.retry = t.mayRetryLost()
		return
	}
	if t.retries >= t.route.Retry.Attempts {
		return
	}
	a.retry = slices.Contains(t.route.Retry.Codes, a.resp.Status) || grpc != "" && slices.Contains(t.route.Retry.GRPC, a.result.GRPC)
}

// mayRetryLost says whether a request that may have reached the application is sent again.
func (t *transfer) mayRetryLost() bool {
	if t.route.Retry.Attempts > 0 {
		return t.retries < t.route.Retry.Attempts
	}
	switch t.out.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return t.retries < maxLostRetries
	}
	return false
}

// finish answers the application with the last attempt.
func (t *transfer) finish(a *attempt) {
	rec := t.rec
	rec.setEndpoint(a.pick)
	defer t.over(a)
	if a.failure != nil {
		t.refuse(a.failure)
		return
	}
	rec.firstByte = a.answered.Sub(rec.start)
	rec.status = a.resp.Status
	rec.code = a.resp.Fields.Value(headerError)
	a.pick.Connected()
	a.resp.Fields.Del(headerUnprocessed)
	t.editResponse(&a.resp.Fields)
	err := t.st.Respond(a.resp, false)
	if err != nil {
		err = &callerError{err}
	} else {
		rec.out, err = copyBody(t.st, a.up)
	}
	rec.noteGRPC(a.resp.Fields, a.up.Trailers())
	if rec.grpc != "" {
		if v, err := strconv.Atoi(rec.grpc); err == nil {
			a.result.GRPC = v
		}
	}
	if err == nil {
		return
	}
	f := failWith(codeCanceled, "the caller went away")
	var caller *callerError
	switch {
	case errors.Is(t.why(), errRequestTimeout):
		f = failWith(codeTimeout, "the answer was not over within %s", t.route.RequestTimeout)
		a.result.Outcome = balance.TimedOut
	case t.why() == nil && !errors.As(err, &caller):
		f = failWith(codeLost, "the answer broke off: %v", err)
		a.result = balance.Result{Outcome: balance.Reset, Reason: err.Error()}
	default:
		a.result.Outcome = balance.Canceled
	}
	rec.code, rec.detail = f.code, f.detail
	t.st.Abort(err) // the caller must see that the answer is not whole
}

// refuse answers with a failure of ours.
func (t *transfer) refuse(f *failure) {
	var fields message.Fields
	edit(&t.route.Response, &fields, nil)
	t.s.refuseWith(t.st, t.rec, f, fields)
}

func (t *transfer) editResponse(fields *message.Fields) {
	edit(&t.backend.Response, fields, nil)
	edit(&t.route.Response, fields, nil)
}

// over lets go of everything once the caller is answered.
func (t *transfer) over(a *attempt) {
	t.st.OnAbort(nil)
	if t.body != nil {
		t.rec.in = t.body.finish()
	}
	t.end(a)
}

func (rec *record) setEndpoint(p balance.Pick) {
	if e := p.Endpoint; e != nil {
		rec.dest, rec.endpoint, rec.level = e.SPIFFEID, e.ID, p.Level
		rec.cluster, rec.region, rec.zone = e.Locality.Cluster, e.Locality.Region, e.Locality.Zone
	}
}

// mirror sends a copy of the request, if its body is at hand, and forgets the answer. What the mirror does never shows.
func (s *Sidecar) mirror(to *proxy.Backend, out *message.Request, body *replay) {
	var copied []byte
	if body != nil {
		if !body.whole() {
			return // a stream, or too long to keep
		}
		copied = append(copied, body.buf...)
	}
	select {
	case s.mirrors <- struct{}{}:
	default:
		return // a slow mirror must not pile up
	}
	req := *out
	req.Fields = append(message.Fields(nil), out.Fields...)
	edit(&to.Request, &req.Fields, &req.Authority)
	req.Fields.Set(headerTarget, to.Cluster)
	req.Length = int64(len(copied))
	s.background.Go(func() {
		defer func() { <-s.mirrors }()
		pick, f := s.pick(to.Cluster, balance.PickInfo{})
		if f != nil {
			return
		}
		started := time.Now()
		result := balance.Result{Outcome: balance.Responded}
		defer func() { pick.Done(result) }()
		up, err := s.openTo(s.coreCtx, to.Cluster, pick, &req, message.Options{End: len(copied) == 0})
		if err == nil {
			defer up.Close()
			timer := time.AfterFunc(10*time.Second, func() { up.Cancel(errRequestTimeout) })
			defer timer.Stop()
			if len(copied) > 0 {
				_, _ = up.Write(copied)
				_ = up.End(nil)
			}
			var resp *message.Response
			if resp, err = up.Response(); err == nil {
				result.Status, result.Latency = resp.Status, time.Since(started)
				discard(up)
			}
		}
		if err != nil {
			result = balance.Result{Outcome: outcomeOf(err), Reason: err.Error()}
		}
	})
}

// discard reads what comes, up to a bound.
func discard(up message.ClientStream) {
	buf := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(buf)
	for n := 0; n < 1<<20; {
		m, err := up.Read(buf[:])
		if err != nil {
			return
		}
		n += m
	}
}

package sidecar

import (
	"context"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/xdsclient"
)

const (
	resolveTimeout = 5 * time.Second
	maxConnTries   = 5 // tries of one request where nothing reached the application
	maxLostRetries = 2 // further tries of an idempotent request after it was lost on the way, unless the route says more
	maxMirrors     = 64
)

// outbound serves the application. fixed is the authority of a local listener, or "" on the explicit proxy.
func (s *Sidecar) outbound(fixed string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := s.begin(reporterSource, requestProtocol(r))
		defer s.finish(rec)
		rec.source = s.ownID()
		rec.method, rec.path = r.Method, requestPath(r.URL)
		if r.ProtoMajor == 1 {
			_ = http.NewResponseController(w).EnableFullDuplex()
			if r.Method == http.MethodConnect || r.Header.Get("Upgrade") != "" {
				w.Header().Set("Connection", "close") // unless it is taken over: the Guard reads no more requests of it
			}
		}
		authority, err := fixed, error(nil)
		if fixed == "" {
			port := uint16(80)
			if r.Method == http.MethodConnect {
				port = 443
			}
			authority, err = authorityOf(r.Host, s.cfg.Namespace, port)
		}
		rec.service = authority
		if err != nil {
			s.refuse(w, r, rec, failWith(codeUnknownService, "%v", err))
			return
		}
		table, listener, f := s.resolve(r.Context(), authority)
		if f != nil {
			s.refuse(w, r, rec, f)
			return
		}
		switch {
		case r.Method == http.MethodConnect:
			s.tunnel(w, r, rec, table, listener)
		case listener.Protocol == proxy.TCP:
			s.refuse(w, r, rec, failWith(codeBadRequest, "%s is a TCP service: use CONNECT", authority))
		default:
			s.serveHTTP(w, r, rec, table, listener, fixed != "")
		}
	})
}

func requestProtocol(r *http.Request) string {
	switch {
	case r.Method == http.MethodConnect:
		return "tcp"
	case isGRPC(r.Header):
		return "grpc"
	case r.ProtoMajor == 2:
		return "http2"
	}
	return "http"
}

func (s *Sidecar) refuse(w http.ResponseWriter, r *http.Request, rec *record, f *failure) {
	rec.fail(f)
	if isGRPC(r.Header) {
		rec.grpc = strconv.Itoa(int(f.grpc))
	}
	f.write(w, r, rec.reporter == reporterDestination)
}

// resolve returns the Listener of an authority and the Table that it is in, asking the control plane where it is not known yet.
func (s *Sidecar) resolve(ctx context.Context, authority string) (*proxy.Table, *proxy.Listener, *failure) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	listener, err := s.cfg.Control.Resolve(ctx, authority)
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

// serveHTTP routes one request.
func (s *Sidecar) serveHTTP(w http.ResponseWriter, r *http.Request, rec *record, table *proxy.Table, l *proxy.Listener, local bool) {
	out := &http.Request{Method: r.Method, Header: r.Header.Clone(), Host: r.Host, ContentLength: r.ContentLength, Trailer: maps.Clone(r.Trailer),
		URL: &url.URL{Scheme: "https", Path: r.URL.Path, RawPath: r.URL.RawPath, Opaque: r.URL.Opaque, RawQuery: r.URL.RawQuery, ForceQuery: r.URL.ForceQuery}}
	if out.URL.Path == "" && out.URL.Opaque == "" {
		out.URL.Path = "/"
	}
	if local {
		out.Host = l.Authority // 127.0.0.1:9001 means nothing to anybody else
	}
	upgrade := upgradeOf(out.Header)
	if strings.EqualFold(upgrade, "h2c") {
		upgrade = "" // RFC 9113 has withdrawn it; the caller goes on with HTTP/1.1
	}
	stripHopByHop(out.Header)
	stripOwn(out.Header)
	delete(out.Header, "Expect") // answered at this side, when the body is wanted
	keepUserAgent(out.Header)
	ctx := s.trace(r.Context(), rec, out.Header, trace.SpanKindClient)

	route := l.Match(&proxy.Request{Method: r.Method, Path: rec.path, RawQuery: r.URL.RawQuery, Header: func(name string) (string, bool) {
		if name == "host" {
			return out.Host, true
		}
		values := r.Header.Values(name)
		return strings.Join(values, ", "), len(values) > 0
	}})
	if route == nil {
		s.refuse(w, r, rec, failWith(codeNoRoute, "no route of %s matches %s %s", l.Authority, r.Method, rec.path))
		return
	}
	rec.route = route.Name
	if d := route.Redirect; d != nil {
		w.Header().Set("Location", d.Location(&route.Match, "http", out.Host, rec.path, r.URL.RawQuery))
		route.Response.Apply(w.Header())
		rec.status = d.Status
		w.WriteHeader(d.Status)
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
		s.refuse(w, r, rec, f)
		return
	}
	route.Request.Apply(hostEditor{out})
	backend.Request.Apply(hostEditor{out})
	rewrite := route.RewriteOf(backend)
	if rewrite.Host != "" {
		out.Host = rewrite.Host
	}
	if p := rewrite.Path(&route.Match, rec.path); p != rec.path {
		if err := setPath(out.URL, p); err != nil {
			s.refuse(w, r, rec, failWith(codeBadRequest, "%v", err))
			return
		}
	}
	if route.RequestTimeout > 0 && upgrade == "" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, route.RequestTimeout, errRequestTimeout)
		defer cancel()
	}
	t := &transfer{s: s, w: w, r: r, rec: rec, table: table, route: route, backend: backend, out: out}
	if upgrade != "" {
		t.upgrade(ctx, upgrade)
		return
	}
	t.body = bodyOf(r)
	if route.Mirror != nil {
		s.mirror(ctx, route.Mirror, out, t.body)
	}
	t.run(ctx)
}

// hostEditor lets header edits reach Host, which net/http keeps apart.
type hostEditor struct{ r *http.Request }

func (e hostEditor) Set(name, value string) {
	if strings.EqualFold(name, "host") {
		e.r.Host = value
		return
	}
	e.r.Header.Set(name, value)
}
func (e hostEditor) Add(name, value string) { e.r.Header.Add(name, value) }
func (e hostEditor) Del(name string)        { e.r.Header.Del(name) }

var (
	errRequestTimeout = errors.New("the route's request timeout")
	errTryTimeout     = errors.New("the route's timeout for one try")
)

// transfer is one request on its way to one of several endpoints.
type transfer struct {
	s       *Sidecar
	w       http.ResponseWriter
	r       *http.Request // as the application sent it
	rec     *record
	table   *proxy.Table
	route   *proxy.Route
	backend *proxy.Backend
	out     *http.Request // as it leaves; never sent itself
	body    *replay       // nil: none

	tried   []string // endpoint IDs
	retries int      // that may have reached the application
}

// attempt is one try.
type attempt struct {
	pick    balance.Pick
	resp    *http.Response
	cancel  context.CancelCauseFunc
	started time.Time
	result  balance.Result
	failure *failure // resp is nil then
	retry   bool     // the policy would try again

	brokeOff bool // the application took the request and ended without an answer
	safe     bool // nothing reached the application
}

func (t *transfer) run(ctx context.Context) {
	informational, settled := passInformational(t.w)
	ctx = httptrace.WithClientTrace(ctx, informational)
	a := t.try(ctx, false, nil)
	for a.retry && t.wait(ctx, &a) {
		a.result.Retried = true
		next, ok := t.again(ctx, &a)
		if !ok {
			break
		}
		a = next
	}
	settled()
	t.finish(&a)
}

// wait is the route's backoff before a try of what may have reached the application. It is false if the time is up, or the body gone.
func (t *transfer) wait(ctx context.Context, a *attempt) bool {
	if ctx.Err() != nil || t.body != nil && !t.body.replayable() {
		return false
	}
	if a.safe || t.route.Retry.Backoff <= 0 {
		return true
	}
	// Full jitter, doubling.
	backoff := rand.N(t.route.Retry.Backoff << min(t.retries, 6))
	timer := time.NewTimer(backoff)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// again makes a further try. It is false if the retry budget or the endpoints are used up: the answer of before stands then.
func (t *transfer) again(ctx context.Context, before *attempt) (attempt, bool) {
	if !before.safe {
		t.retries++
	}
	// A peer or an application that died takes all its calls at once. Trying them elsewhere once is no storm, and must not be cut short
	// by the budget.
	died := before.result.Outcome == balance.Dead || before.brokeOff && t.retries == 1
	// What the last try has shown is told as soon as another endpoint is found, not when that one has answered: others must not
	// wait for the same dead endpoint meanwhile.
	a := t.try(ctx, !before.safe && !died, func() { t.end(before) })
	if a.failure != nil && a.pick.Endpoint == nil {
		before.result.Retried = false
		return a, false
	}
	return a, true
}

// end gives up an attempt whose answer is not used.
func (t *transfer) end(a *attempt) {
	if a.resp != nil {
		_ = a.resp.Body.Close()
	}
	if a.cancel != nil {
		a.cancel(nil)
	}
	a.pick.Done(a.result)
}

// try sends the request to one endpoint and waits for the head of the answer. picked, if not nil, is called once there is an endpoint.
func (t *transfer) try(ctx context.Context, counts bool, picked func()) attempt {
	info := balance.PickInfo{Exclude: t.tried, Retry: counts}
	if c := t.table.Clusters[t.backend.Cluster]; c != nil && c.HashHeader != "" {
		if v := t.out.Header.Get(c.HashHeader); v != "" {
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
	e := pick.Endpoint
	t.tried = append(t.tried, e.ID)
	t.rec.tries++
	a := attempt{pick: pick, started: time.Now()}
	tryCtx, cancel := context.WithCancelCause(ctx)
	a.cancel = cancel
	if t.route.TryTimeout > 0 {
		timer := time.AfterFunc(t.route.TryTimeout, func() { cancel(errTryTimeout) })
		defer timer.Stop()
	}
	req := t.out.WithContext(tryCtx)
	req.Header = t.out.Header.Clone()
	if e.Transport == proxy.TransportHop {
		req.Header.Set(headerTarget, t.backend.Cluster)
	}
	req.URL.Host = t.backend.Cluster
	if t.body != nil {
		body, ok := t.body.next()
		if !ok {
			a.result.Outcome = balance.Canceled
			a.failure = failWith(codeLost, "the body cannot be sent again")
			return a
		}
		req.Body = body
		req.Trailer = maps.Clone(t.out.Trailer)
		body.ended = func() { // by then the caller's trailers are known
			for name := range req.Trailer {
				req.Trailer[name] = t.r.Trailer[name]
			}
		}
	}
	resp, err := t.s.roundTrip(t.backend.Cluster, pick, req)
	if err != nil {
		t.classify(&a, tryCtx, err)
		return a
	}
	a.resp = resp
	t.judge(&a)
	return a
}

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

func (s *Sidecar) roundTrip(cluster string, pick balance.Pick, req *http.Request) (*http.Response, error) {
	if pick.Endpoint.Transport == proxy.TransportPlaintext {
		return s.plaintext.roundTrip(pick.Endpoint, s.cfg.Control.Table().Clusters[cluster], req)
	}
	peer, err := s.peer(cluster, pick)
	if err != nil {
		return nil, err
	}
	return s.hop.RoundTrip(peer, req)
}

// peer is the picked endpoint as the hop dials it.
func (s *Sidecar) peer(cluster string, pick balance.Pick) (hop.Peer, error) {
	peer, err := peerOf(pick.Endpoint)
	peer.Gateway = pick.Gateway
	if c := s.cfg.Control.Table().Clusters[cluster]; c != nil {
		peer.ConnectTimeout = c.ConnectTimeout
	}
	return peer, err
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

// classify turns a failed round trip into what is answered and whether it is tried again.
func (t *transfer) classify(a *attempt, tryCtx context.Context, err error) {
	cause := context.Cause(tryCtx)
	switch {
	case errors.Is(cause, errTryTimeout):
		a.result = balance.Result{Outcome: balance.TimedOut, Reason: cause.Error()}
		a.failure = failWith(codeTimeout, "%s gave no answer within %s", a.pick.Endpoint.ID, t.route.TryTimeout)
		a.retry = t.mayRetryLost()
	case errors.Is(cause, errRequestTimeout):
		a.result = balance.Result{Outcome: balance.TimedOut, Reason: cause.Error()}
		a.failure = failWith(codeTimeout, "no answer within %s", t.route.RequestTimeout)
	case cause != nil:
		a.result = balance.Result{Outcome: balance.Canceled}
		a.failure = failWith(codeCanceled, "the caller went away")
	default:
		a.result = balance.Result{Outcome: outcomeOf(err), Reason: err.Error()}
		if a.safe = !hop.Sent(err); a.safe {
			a.failure = failWith(codeUnreachable, "%v", err)
			a.retry = len(t.tried) < maxConnTries
		} else {
			a.failure = failWith(codeLost, "%v", err)
			a.retry = t.mayRetryLost()
		}
	}
}

// judge decides on an answer.
func (t *transfer) judge(a *attempt) {
	a.result = balance.Result{Outcome: balance.Responded, Status: a.resp.StatusCode, Latency: time.Since(a.started)}
	grpc := a.resp.Header.Get("Grpc-Status") // Trailers-Only; with a body the status comes too late to try again
	if n, err := strconv.Atoi(grpc); err == nil {
		a.result.GRPC = n
	}
	if a.resp.Header.Get(headerUnprocessed) == "true" {
		a.safe = true
		a.result.Outcome, a.result.Reason = balance.Refused, a.resp.Header.Get(headerError)
		a.retry = len(t.tried) < maxConnTries
		return
	}
	if a.resp.Header.Get(headerError) == codeAppFailed { // the far sidecar's word: the application took the request and broke off
		a.result.Reason, a.brokeOff = "the application broke off", true
		a.retry = t.mayRetryLost()
		return
	}
	if t.retries >= t.route.Retry.Attempts {
		return
	}
	a.retry = slices.Contains(t.route.Retry.Codes, a.resp.StatusCode) || grpc != "" && slices.Contains(t.route.Retry.GRPC, a.result.GRPC)
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
	defer func() {
		if t.body != nil {
			rec.in = t.body.finish()
		}
	}()
	if a.failure != nil {
		t.end(a)
		t.route.Response.Apply(t.w.Header())
		t.s.refuse(t.w, t.r, rec, a.failure)
		return
	}
	defer t.end(a)
	rec.firstByte = time.Since(rec.start)
	rec.status = a.resp.StatusCode
	rec.code = a.resp.Header.Get(headerError)
	a.pick.Connected()
	stripHopByHop(a.resp.Header)
	a.resp.Header.Del(headerUnprocessed)
	t.backend.Response.Apply(a.resp.Header)
	t.route.Response.Apply(a.resp.Header)
	n, err := writeResponse(t.w, a.resp)
	rec.out = n
	rec.noteGRPC(a.resp)
	if v, convErr := strconv.Atoi(rec.grpc); convErr == nil {
		a.result.GRPC = v
	}
	if err == nil {
		return
	}
	f := failWith(codeCanceled, "the caller went away")
	switch {
	case errors.Is(context.Cause(a.resp.Request.Context()), errRequestTimeout):
		f = failWith(codeTimeout, "the answer was not over within %s", t.route.RequestTimeout)
		a.result.Outcome = balance.TimedOut
	case t.r.Context().Err() == nil:
		f = failWith(codeLost, "the answer broke off: %v", err)
		a.result = balance.Result{Outcome: balance.Reset, Reason: err.Error()}
	default:
		a.result.Outcome = balance.Canceled
	}
	rec.code, rec.detail = f.code, f.detail
	panic(http.ErrAbortHandler) // the caller must see that the answer is not whole
}

func (rec *record) setEndpoint(p balance.Pick) {
	if e := p.Endpoint; e != nil {
		rec.dest, rec.endpoint, rec.level = e.SPIFFEID, e.ID, p.Level
		rec.cluster, rec.region, rec.zone = e.Locality.Cluster, e.Locality.Region, e.Locality.Zone
	}
}

func (rec *record) noteGRPC(resp *http.Response) {
	if rec.protocol != "grpc" {
		return
	}
	if rec.grpc = resp.Trailer.Get("Grpc-Status"); rec.grpc == "" {
		rec.grpc = resp.Header.Get("Grpc-Status")
	}
	if len(rec.grpc) > 2 {
		rec.grpc = "invalid" // a peer's invention must not become a label
	}
}

// mirror sends a copy of the request, if its body is at hand, and forgets the answer. What the mirror does never shows.
func (s *Sidecar) mirror(ctx context.Context, to *proxy.Backend, out *http.Request, body *replay) {
	if body != nil && (out.ContentLength < 0 || out.ContentLength > maxReplay) {
		return // a stream, or too long to keep
	}
	var copied []byte
	if body != nil {
		first, _ := body.next()
		b, err := io.ReadAll(first)
		if err != nil {
			return
		}
		copied = b
	}
	select {
	case s.mirrors <- struct{}{}:
	default:
		return // a slow mirror must not pile up
	}
	req := out.Clone(context.WithoutCancel(ctx))
	to.Request.Apply(hostEditor{req})
	s.background.Go(func() {
		defer func() { <-s.mirrors }()
		ctx, cancel := context.WithTimeout(s.coreCtx, 10*time.Second)
		defer cancel()
		pick, f := s.pick(to.Cluster, balance.PickInfo{})
		if f != nil {
			return
		}
		req = req.WithContext(ctx)
		req.Header.Set(headerTarget, to.Cluster)
		req.URL.Host = to.Cluster
		if len(copied) > 0 {
			req.Body = io.NopCloser(strings.NewReader(string(copied)))
			req.ContentLength = int64(len(copied))
		}
		started := time.Now()
		resp, err := s.roundTrip(to.Cluster, pick, req)
		if err != nil {
			pick.Done(balance.Result{Outcome: outcomeOf(err), Reason: err.Error()})
			return
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20))
		_ = resp.Body.Close()
		pick.Done(balance.Result{Outcome: balance.Responded, Status: resp.StatusCode, Latency: time.Since(started)})
	})
}

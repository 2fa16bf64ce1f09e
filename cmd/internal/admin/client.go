package admin

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

const (
	dialTimeout = 5 * time.Second
	// callTimeout bounds an operation that is not streamed.
	callTimeout = time.Minute
	// maxAnswer bounds what is read of one answer, and maxEvent of one event, in bytes.
	maxAnswer = 256 << 20
	maxEvent  = 8 << 20
)

// Config says where hansed is: a Unix socket, an address with mutual TLS, or whatever Dial connects to.
type Config struct {
	Socket  string
	Address string      // host:port, when Socket is empty
	TLS     *tls.Config // required with Address

	Dial  func(context.Context) (net.Conn, error) // to hansed's socket, some other way
	Where string                                  // with Dial, for people
}

// Client is a Backend that is elsewhere. Its errors are *Error where hansed said why, or where it could not be reached.
type Client struct {
	where string
	base  string
	http  *http.Client
}

var _ Backend = (*Client)(nil)

// New returns a Client. It does not connect.
func New(cfg Config) (*Client, error) {
	t := &http.Transport{
		DisableCompression:    true,
		MaxIdleConns:          2,
		IdleConnTimeout:       30 * time.Second,
		ResponseHeaderTimeout: 0, // a stream's first event may take its time; other calls have callTimeout
	}
	d := &net.Dialer{Timeout: dialTimeout}
	c := &Client{http: &http.Client{Transport: t}}
	switch {
	case cfg.Dial != nil:
		c.where, c.base = cfg.Where, "http://hansed"
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return cfg.Dial(ctx) }
	case cfg.Socket != "":
		c.where, c.base = cfg.Socket, "http://hansed"
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", cfg.Socket)
		}
	case cfg.Address != "" && cfg.TLS != nil:
		c.where, c.base = cfg.Address, "https://"+cfg.Address
		t.DialTLSContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := d.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			tc := tls.Client(conn, cfg.TLS)
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			if err := tc.HandshakeContext(ctx); err != nil {
				conn.Close()
				return nil, &handshakeError{err}
			}
			return tc, nil
		}
	default:
		return nil, errors.New("a socket, or an address with an admin SVID, is needed to reach hansed")
	}
	return c, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for the state of the cluster.
func (c *Client) Status(ctx context.Context) (v Status, err error) {
	return v, c.get(ctx, "/v1/status", nil, &v)
}

// Clusters lists the members, own cluster first.
func (c *Client) Clusters(ctx context.Context) (v Clusters, err error) {
	return v, c.get(ctx, "/v1/clusters", nil, &v)
}

// Services lists the services that can be called.
func (c *Client) Services(ctx context.Context) (v []Service, err error) {
	return v, c.get(ctx, "/v1/services", nil, &v)
}

// Endpoints lists the endpoints of a service.
func (c *Client) Endpoints(ctx context.Context, service string) (v []Endpoint, err error) {
	return v, c.get(ctx, "/v1/endpoints", url.Values{"service": {service}}, &v)
}

// Proxies lists the connected proxies.
func (c *Client) Proxies(ctx context.Context) (v []Proxy, err error) {
	return v, c.get(ctx, "/v1/proxies", nil, &v)
}

// Explain explains a call.
func (c *Client) Explain(ctx context.Context, req ExplainRequest) (v Explanation, err error) {
	return v, c.post(ctx, "/v1/explain", req, &v)
}

// CreateToken makes a token.
func (c *Client) CreateToken(ctx context.Context, req TokenRequest) (v Token, err error) {
	return v, c.post(ctx, "/v1/tokens", req, &v)
}

// IssueAdmin has an administrator's SVID signed.
func (c *Client) IssueAdmin(ctx context.Context, req AdminRequest) (v AdminSVID, err error) {
	return v, c.post(ctx, "/v1/admins", req, &v)
}

// Identities lists SPIFFE IDs.
func (c *Client) Identities(ctx context.Context) (v []Identity, err error) {
	return v, c.get(ctx, "/v1/identities", nil, &v)
}

// Identity shows one.
func (c *Client) Identity(ctx context.Context, id string) (v Identity, err error) {
	return v, c.get(ctx, "/v1/identities", url.Values{"id": {id}}, &v)
}

// Mint has an SVID signed by hand.
func (c *Client) Mint(ctx context.Context, req MintRequest) (v Minted, err error) {
	return v, c.post(ctx, "/v1/mint", req, &v)
}

// Join joins a mesh, or with req.Check finds out whether it could.
func (c *Client) Join(ctx context.Context, req JoinRequest, emit func(Event) error) (v JoinResult, err error) {
	return v, c.stream(ctx, "/v1/join", req, emit, &v)
}

// Leave takes a member, or this cluster, out of the mesh.
func (c *Client) Leave(ctx context.Context, req LeaveRequest) (v LeaveResult, err error) {
	return v, c.post(ctx, "/v1/leave", req, &v)
}

// AcceptHeld accepts the loss that a member's mirror holds back.
func (c *Client) AcceptHeld(ctx context.Context, member string) error {
	return c.post(ctx, "/v1/clusters/"+url.PathEscape(member)+"/accept", struct{}{}, &struct{}{})
}

// TrustList lists the trust domains.
func (c *Client) TrustList(ctx context.Context) (v []TrustDomain, err error) {
	return v, c.get(ctx, "/v1/trust", nil, &v)
}

// TrustShow shows one trust domain.
func (c *Client) TrustShow(ctx context.Context, trustDomain string) (v TrustDomain, err error) {
	return v, c.get(ctx, "/v1/trust/"+url.PathEscape(trustDomain), nil, &v)
}

// TrustAdd trusts a domain.
func (c *Client) TrustAdd(ctx context.Context, req TrustAdd) (v TrustDomain, err error) {
	return v, c.post(ctx, "/v1/trust", req, &v)
}

// TrustRemove ends the trust in a domain.
func (c *Client) TrustRemove(ctx context.Context, trustDomain string) error {
	return c.call(ctx, http.MethodDelete, "/v1/trust/"+url.PathEscape(trustDomain), nil, "", nil, &struct{}{})
}

// TrustRefresh fetches a bundle now.
func (c *Client) TrustRefresh(ctx context.Context, trustDomain string) (v TrustDomain, err error) {
	return v, c.post(ctx, "/v1/trust/"+url.PathEscape(trustDomain)+"/refresh", struct{}{}, &v)
}

// TrustRotate rotates the root.
func (c *Client) TrustRotate(ctx context.Context, req RotateRequest, emit func(Event) error) (v Rotation, err error) {
	return v, c.stream(ctx, "/v1/trust-rotate", req, emit, &v)
}

// TrustDistrust takes something out of force.
func (c *Client) TrustDistrust(ctx context.Context, req DistrustRequest, emit func(Event) error) (v Distrusted, err error) {
	return v, c.stream(ctx, "/v1/trust-distrust", req, emit, &v)
}

// Apply stores objects.
func (c *Client) Apply(ctx context.Context, yaml []byte, dryRun bool) (v []Applied, err error) {
	q := url.Values{}
	if dryRun {
		q.Set("dryRun", "true")
	}
	return v, c.call(ctx, http.MethodPost, "/v1/apply", q, typeYAML, yaml, &v)
}

// ListObjects lists objects.
func (c *Client) ListObjects(ctx context.Context, kind, namespace, name string) (v []Object, err error) {
	return v, c.get(ctx, "/v1/objects", url.Values{"kind": {kind}, "namespace": {namespace}, "name": {name}}, &v)
}

// DeleteObject deletes an object.
func (c *Client) DeleteObject(ctx context.Context, kind, namespace, name string) (v Applied, err error) {
	q := url.Values{"kind": {kind}, "namespace": {namespace}, "name": {name}}
	return v, c.call(ctx, http.MethodDelete, "/v1/objects", q, "", nil, &v)
}

// DrillPlan says what a drill would do.
func (c *Client) DrillPlan(ctx context.Context, spec DrillSpec) (v DrillPlan, err error) {
	return v, c.post(ctx, "/v1/drills/plan", spec, &v)
}

// DrillRun runs a drill to its end.
func (c *Client) DrillRun(ctx context.Context, spec DrillSpec, emit func(Event) error) (v Drill, err error) {
	return v, c.stream(ctx, "/v1/drills", spec, emit, &v)
}

// DrillList lists the drills that hansed remembers, newest first.
func (c *Client) DrillList(ctx context.Context) (v []Drill, err error) {
	return v, c.get(ctx, "/v1/drills", nil, &v)
}

// DrillGet reports on a drill.
func (c *Client) DrillGet(ctx context.Context, id string) (v Drill, err error) {
	return v, c.get(ctx, "/v1/drills/"+url.PathEscape(id), nil, &v)
}

// DrillStop stops a drill and heals.
func (c *Client) DrillStop(ctx context.Context, id string) (v Drill, err error) {
	return v, c.post(ctx, "/v1/drills/"+url.PathEscape(id)+"/stop", struct{}{}, &v)
}

func (c *Client) get(ctx context.Context, path string, q url.Values, v any) error {
	return c.call(ctx, http.MethodGet, path, q, "", nil, v)
}

func (c *Client) post(ctx context.Context, path string, req, v any) error {
	b, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	return c.call(ctx, http.MethodPost, path, nil, typeJSON, b, v)
}

// call makes one request and decodes its answer into v.
func (c *Client) call(ctx context.Context, method, path string, q url.Values, contentType string, body []byte, v any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := c.do(ctx, method, path, q, contentType, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return c.unreachable(err)
	}
	if len(b) > maxAnswer {
		return fmt.Errorf("the answer of hansed at %s is larger than %d MiB", c.where, maxAnswer>>20)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("decode the answer of hansed at %s: %w", c.where, err)
	}
	return nil
}

// stream makes one request, hands its events to emit and decodes the last one's data into v. An error of emit ends it.
func (c *Client) stream(ctx context.Context, path string, req any, emit func(Event) error, v any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	res, err := c.do(ctx, http.MethodPost, path, nil, typeJSON, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("decode an event of hansed at %s: %w", c.where, err)
		}
		switch {
		case e.Error != nil:
			return e.Error
		case e.Done:
			if err := json.Unmarshal(e.Data, v); err != nil {
				return fmt.Errorf("decode the result of hansed at %s: %w", c.where, err)
			}
			return nil
		default:
			if err := emit(e); err != nil {
				return err
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return &Error{
		Message: fmt.Sprintf("hansed at %s went away before it was done", c.where),
		Hint:    "look at its log, then repeat the command: what was half done is finished or undone by repeating",
	}
}

// do sends a request; an answer that is not 2xx is an *Error.
func (c *Client) do(ctx context.Context, method, path string, q url.Values, contentType string, body []byte) (*http.Response, error) {
	u := c.base + path
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(err)
	}
	if res.StatusCode/100 == 2 {
		return res, nil
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return nil, c.unreachable(err)
	}
	e := &Error{Status: res.StatusCode}
	if json.Unmarshal(b, e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("%s answered %s, and not as hansed does", c.where, res.Status)
		e.Hint = "is that the administration socket or address of hansed? see `hanse contexts`"
	}
	return nil, e
}

// unreachable says why hansed could not be talked to, and what to do.
func (c *Client) unreachable(err error) error {
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err
	}
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return &Error{
			Message: fmt.Sprintf("hansed is not running here: there is no socket %s", c.where),
			Hint:    "start hansed, or say where it is: --socket, --context, $HANSE_SOCKET or $HANSE_CONFIG",
		}
	case errors.Is(err, fs.ErrPermission):
		return &Error{
			Message: fmt.Sprintf("you may not use hansed's socket %s: permission denied", c.where),
			Hint:    "run this as " + owner(c.where) + ": who may open the socket is an administrator",
		}
	case errors.Is(err, syscall.ECONNREFUSED) && c.base == "http://hansed":
		return &Error{
			Message: fmt.Sprintf("hansed is down: nobody listens on its socket %s", c.where),
			Hint:    "start hansed; its log says why it ended",
		}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &Error{
			Message: fmt.Sprintf("hansed does not listen at %s", c.where),
			Hint:    "is that its address for remote administration (port 7447), and is it running?",
		}
	}
	var alert tls.AlertError // what the server made of our SVID comes after the handshake, in TLS 1.3
	if refused := (*handshakeError)(nil); errors.As(err, &refused) || errors.As(err, &alert) {
		return &Error{
			Message: fmt.Sprintf("no mutual TLS with %s: %v", c.where, err),
			Hint:    "the context's svid must be spiffe://<trust domain>/hanse/admin/<name>, unexpired, and its bundle that of the cluster",
		}
	}
	if t := (interface{ Timeout() bool })(nil); errors.As(err, &t) && t.Timeout() {
		return &Error{
			Message: fmt.Sprintf("hansed at %s did not answer in time", c.where),
			Hint:    "it may be overloaded or stopped: look at its log and at 127.0.0.1:7440/readyz on its machine",
		}
	}
	e := &Error{Message: fmt.Sprintf("talk to hansed at %s: %v", c.where, err)}
	var hinted interface{ Hint() string } // by who dials
	if errors.As(err, &hinted) {
		e.Hint = hinted.Hint()
	}
	return e
}

// handshakeError is a connection that did not come about: one side did not accept who the other is.
type handshakeError struct{ err error }

func (e *handshakeError) Error() string { return e.err.Error() }
func (e *handshakeError) Unwrap() error { return e.err }

// owner names who owns the socket, as numbers: enough for `sudo -u` and `id`.
func owner(path string) string {
	if fi, err := os.Stat(path); err == nil {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			return fmt.Sprintf("its owner (uid %d) or a member of its group (gid %d)", st.Uid, st.Gid)
		}
	}
	return "its owner"
}

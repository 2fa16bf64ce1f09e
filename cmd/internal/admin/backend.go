package admin

import (
	"context"
	"fmt"
	"net/http"
)

// Backend does what the operations say. Handler serves one over HTTP; hansed is one; tests have a fake that is served by the same Handler.
//
// Methods may be called at the same time. An error that is (or wraps) *Error goes to the caller as it is, with its Status and Hint; any
// other becomes a 500 with its text. Names of services and workloads are "namespace/name"; a name without a namespace is "default"'s.
type Backend interface {
	Status(ctx context.Context) (Status, error)
	Clusters(ctx context.Context) (Clusters, error)
	Services(ctx context.Context) ([]Service, error)
	// Endpoints lists the endpoints of a service in every cluster. An unknown service is NotFound.
	Endpoints(ctx context.Context, service string) ([]Endpoint, error)
	Proxies(ctx context.Context) ([]Proxy, error)
	// Explain succeeds when it could find out, also that the call would fail: see Explanation.OK.
	Explain(ctx context.Context, req ExplainRequest) (Explanation, error)

	CreateToken(ctx context.Context, req TokenRequest) (Token, error)
	// IssueAdmin signs spiffe://<td>/hanse/admin/<name> for a key of the caller's.
	IssueAdmin(ctx context.Context, req AdminRequest) (AdminSVID, error)
	// Identities lists the SPIFFE IDs that this cluster issues or knows of in its trust domain, sorted.
	Identities(ctx context.Context) ([]Identity, error)
	// Identity shows one; NotFound if neither an entry nor an endpoint has it.
	Identity(ctx context.Context, id string) (Identity, error)
	// Mint signs an SVID by hand. Reserved IDs are refused.
	Mint(ctx context.Context, req MintRequest) (Minted, error)
	// Join emits a Step for what it does and a Check for each fact it found, and ends with what came of it. With req.Check it
	// changes nothing on either side. A failed check is an error after its Check was emitted.
	Join(ctx context.Context, req JoinRequest, emit func(Event) error) (JoinResult, error)
	Leave(ctx context.Context, req LeaveRequest) (LeaveResult, error)
	// AcceptHeld lets the mirror of a member apply the loss that it holds back. NotFound if no such member, 409 if nothing is held.
	AcceptHeld(ctx context.Context, member string) error

	TrustList(ctx context.Context) ([]TrustDomain, error)
	TrustShow(ctx context.Context, trustDomain string) (TrustDomain, error)
	TrustAdd(ctx context.Context, req TrustAdd) (TrustDomain, error)
	TrustRemove(ctx context.Context, trustDomain string) error
	// TrustRefresh fetches a trust domain's bundle from its endpoint now.
	TrustRefresh(ctx context.Context, trustDomain string) (TrustDomain, error)
	// TrustRotate prepares the next root of this cluster, and activates it when all have loaded it. It emits a Rotation whenever that
	// has changed, and about each second. The rotation goes on without its watcher.
	TrustRotate(ctx context.Context, req RotateRequest, emit func(Event) error) (Rotation, error)
	// TrustDistrust takes a trust domain or an authority out of force and waits for all to confirm it. It emits a Distrusted whenever
	// that has changed, and about each second. What is done stays done without its watcher.
	TrustDistrust(ctx context.Context, req DistrustRequest, emit func(Event) error) (Distrusted, error)

	// Apply stores the objects of a YAML stream, all or none. A refused one is an *Error with Faults. With dryRun it says what would happen.
	Apply(ctx context.Context, yaml []byte, dryRun bool) ([]Applied, error)
	// ListObjects lists one kind ("" is all), in one namespace ("" is all), of one name ("" is all).
	ListObjects(ctx context.Context, kind, namespace, name string) ([]Object, error)
	DeleteObject(ctx context.Context, kind, namespace, name string) (Applied, error)

	DrillPlan(ctx context.Context, spec DrillSpec) (DrillPlan, error)
	// DrillRun runs a drill to its end and returns its report. It emits the Drill as it stands (see DrillEvent) at the start and about
	// each second. A cancelled ctx stops and heals the drill if spec.KeepAlive is set, else the drill goes on without its watcher.
	DrillRun(ctx context.Context, spec DrillSpec, emit func(Event) error) (Drill, error)
	// DrillList is newest first.
	DrillList(ctx context.Context) ([]Drill, error)
	DrillGet(ctx context.Context, id string) (Drill, error)
	// DrillStop heals at once and returns the report as it then stands. Stopping what is over changes nothing.
	DrillStop(ctx context.Context, id string) (Drill, error)
}

// NotFound is an Error with status 404.
func NotFound(hint, format string, args ...any) *Error {
	return &Error{Status: http.StatusNotFound, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// Refused is an Error with status 409: understood, but not in this state.
func Refused(hint, format string, args ...any) *Error {
	return &Error{Status: http.StatusConflict, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// Invalid is an Error with status 400: the request itself is wrong.
func Invalid(hint, format string, args ...any) *Error {
	return &Error{Status: http.StatusBadRequest, Message: fmt.Sprintf(format, args...), Hint: hint}
}

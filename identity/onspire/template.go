package onspire

import (
	"fmt"
	"strings"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Workload is what a Template is filled in with: one endpoint of a discovered service.
type Workload struct {
	TrustDomain, Cluster      string
	ID                        string // SPIFFE ID
	Namespace, ServiceAccount string // empty for gateways and the control plane
	Address, Hostname         string
	Region, Zone              string
}

// Template makes registration entries. Its strings are Go's text/template over a Workload.
type Template struct {
	parent    *template.Template
	selectors []*template.Template
}

// ParseTemplate reads a template, and tries it on a made-up workload.
func ParseTemplate(parent string, selectors []string) (*Template, error) {
	t := &Template{}
	var err error
	if t.parent, err = parse(parent); err != nil {
		return nil, fmt.Errorf("parent %q: %w", parent, err)
	}
	if len(selectors) == 0 {
		return nil, fmt.Errorf("selectors: none; without any the entry would be nobody's: give some, such as k8s:sa:{{.ServiceAccount}}")
	}
	for _, s := range selectors {
		p, err := parse(s)
		if err != nil {
			return nil, fmt.Errorf("selector %q: %w", s, err)
		}
		t.selectors = append(t.selectors, p)
	}
	_, err = t.Entry(Workload{TrustDomain: "west.example", Cluster: "west", ID: "spiffe://west.example/ns/shop/sa/payments", Namespace: "shop",
		ServiceAccount: "payments", Address: "10.1.0.7", Hostname: "payments-0", Region: "eu-1", Zone: "eu-1a"})
	return t, err
}

func parse(s string) (*template.Template, error) {
	return template.New("").Option("missingkey=error").Parse(s)
}

// Entry fills in.
func (t *Template) Entry(w Workload) (Entry, error) {
	fill := func(t *template.Template) (string, error) {
		var b strings.Builder
		err := t.Execute(&b, w)
		return b.String(), err
	}
	var e Entry
	var err error
	if e.ID, err = spiffeid.FromString(w.ID); err != nil {
		return Entry{}, fmt.Errorf("workload %q: %w", w.ID, err)
	}
	parent, err := fill(t.parent)
	if err != nil {
		return Entry{}, fmt.Errorf("parent: %w", err)
	}
	if e.Parent, err = spiffeid.FromString(parent); err != nil {
		return Entry{}, fmt.Errorf("parent %q: %w", parent, err)
	}
	for _, s := range t.selectors {
		v, err := fill(s)
		if err != nil {
			return Entry{}, fmt.Errorf("selector: %w", err)
		}
		if kind, value, ok := strings.Cut(v, ":"); !ok || kind == "" || value == "" || strings.HasSuffix(value, ":") {
			return Entry{}, fmt.Errorf("selector %q: want type:value, such as unix:uid:1000", v) // with an empty end it would be anybody's
		}
		e.Selectors = append(e.Selectors, v)
	}
	return e, nil
}

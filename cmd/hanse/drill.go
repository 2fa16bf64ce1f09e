package main

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/drill"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
)

func (c *cli) drillCommand() *cobra.Command {
	group := &cobra.Command{
		Use:   "drill",
		Short: "Fail on purpose, within bounds, and measure what happens",
		Long: `A drill makes a part of a cluster fail: for a time, with a guard that stops it, healing by itself whoever dies. It reports how long it took until
callers noticed and until traffic had shifted, which calls failed, where the traffic went and when it came back.

Modes: drain (endpoints say goodbye), blackhole (packets vanish), errors and slow (answers get worse), silence-control-plane (hansed answers no peer),
cut-federation (the links to the peers are cut), expire-certificates (sidecars present SVIDs that have expired), distrust-root (what rests on --root is refused),
rotate (the root of the cluster is replaced, from announcing the next one to dropping the old: the one mode that changes something for good). A drill hits the cluster whose hansed runs it: use --context for another's.`,
	}
	ids := c.complete(func(cmd *cobra.Command, b *admin.Client) ([]string, error) {
		l, err := b.DrillList(cmd.Context())
		var ids []string
		for _, d := range l {
			ids = append(ids, d.ID)
		}
		return ids, err
	})

	var planned drillFlags
	plan := &cobra.Command{
		Use: "plan --MODE [scope]", Short: "Say what a drill would hit and who would take over; start nothing",
		Long:              "Say which endpoints a drill would hit, who would take over each service, and where nobody can. Nothing is started. The exit code is 1 if a service is not covered.",
		Example:           "  hanse drill plan --blackhole --cluster west --service payments\n  hanse drill plan --drain --zone eu-1a -o json",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			spec, err := planned.spec(c, cmd, b)
			if err != nil {
				return err
			}
			p, err := b.DrillPlan(cmd.Context(), spec)
			if err != nil {
				return err
			}
			if c.structured() {
				err = c.print(p)
			} else {
				c.printPlan(c.out, c.palette(), p)
				fmt.Fprintf(c.out, "Nothing started. Run: hanse drill run%s --yes\n", planned.line(cmd))
			}
			if err == nil && !p.Covered {
				return errSaid
			}
			return err
		},
	}
	planned.add(c, plan)
	c.outputFlag(plan, "json", "yaml")

	var ran drillFlags
	var yes, detach bool
	run := &cobra.Command{
		Use: "run --MODE [scope]", Short: "Run a drill and report",
		Long: `Run a drill: show the plan, ask, start, show progress, and report. Ctrl-C stops it and heals. It also heals by itself when its time is over, when the
guard trips, and when this command or hansed dies. The exit code is 1 if the drill did not pass.`,
		Example:           "  hanse drill run --blackhole --service payments --for 60s\n  hanse drill run --drain --zone eu-1a --abort-if 'success<99.9%' --yes -o junit > drill.xml\n  hanse drill run -f game-day.yaml",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			spec, err := ran.spec(c, cmd, b)
			if err != nil {
				return err
			}
			if !yes {
				if !c.inTTY || !c.errTTY {
					return usage("see hanse drill plan"+ran.line(cmd)+", then add --yes", "there is no terminal to ask whether to start")
				}
				p, err := b.DrillPlan(cmd.Context(), spec)
				if err != nil {
					return err
				}
				c.printPlan(c.err, palette{c.errTTY && c.colours()}, p)
				if ok, err := c.confirm(false, "Start it?"); err != nil {
					return err
				} else if !ok {
					fmt.Fprintln(c.err, "Nothing started.")
					return errSaid
				}
			}
			spec.KeepAlive = !detach
			return c.runDrill(cmd.Context(), b, spec, detach)
		},
	}
	ran.add(c, run)
	run.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	run.Flags().BoolVar(&detach, "detach", false, "start it and return; see hanse drill status")
	c.outputFlag(run, "json", "yaml", "junit")

	status := &cobra.Command{
		Use: "status [ID]", Short: "List the drills, or show how one stands", Example: "  hanse drill status\n  hanse drill status d-7f2",
		Args: cobra.MaximumNArgs(1), ValidArgsFunction: ids,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			if len(args) == 1 {
				d, err := b.DrillGet(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if c.structured() {
					return c.print(d)
				}
				fmt.Fprintln(c.out, drillLine(d))
				return nil
			}
			l, err := b.DrillList(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(l)
			}
			if len(l) == 0 {
				fmt.Fprintln(c.out, "No drill has been run. Try: hanse drill plan --blackhole --service NAME")
				return nil
			}
			t := newTable("DRILL", "MODE", "SCOPE", "STATE", "VERDICT", "SUCCESS", "STARTED")
			for _, d := range l {
				t.row(plain(d.ID), plain(d.Spec.Mode), plain(scopeText(d.Spec.Scope)), plain(d.State), verdict(d), plain(succeeded(d)), plain(age(c.now().Sub(d.Started).Seconds())+" ago"))
			}
			c.table(t)
			return nil
		},
	}
	c.outputFlag(status, "json", "yaml")

	stop := &cobra.Command{
		Use: "stop ID", Short: "Stop a drill and heal", Example: "  hanse drill stop d-7f2", Args: cobra.ExactArgs(1), ValidArgsFunction: ids,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			d, err := b.DrillStop(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "drill %s: %s. Report: hanse drill report %s\n", d.ID, d.State, d.ID)
			return nil
		},
	}
	report := &cobra.Command{
		Use: "report ID", Short: "Report on a drill", Example: "  hanse drill report d-7f2\n  hanse drill report d-7f2 -o junit > drill.xml",
		Long: "Report on a drill, as far as it has come. docs/drills.md says what each figure means.",
		Args: cobra.ExactArgs(1), ValidArgsFunction: ids,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			d, err := b.DrillGet(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.reportDrill(d)
		},
	}
	c.outputFlag(report, "json", "yaml", "junit")
	group.AddCommand(plan, run, status, stop, report)
	return group
}

// drillFlags say what a drill does.
type drillFlags struct {
	file    string
	mode    string
	modes   map[string]*bool
	scope   admin.DrillScope
	share   string
	length  time.Duration
	abortIf string
	latency time.Duration
	status  int
	root    string
}

func (f *drillFlags) add(c *cli, cmd *cobra.Command) {
	texts := map[string]string{
		drill.Drain:               "endpoints ask for no new calls and finish those they have",
		drill.Blackhole:           "packets to and from endpoints vanish",
		drill.Errors:              "endpoints answer with an error (--status)",
		drill.Slow:                "endpoints answer late (--latency)",
		drill.ExpireCertificates:  "sidecars present SVIDs that have expired",
		drill.DistrustRoot:        "what rests on a trust domain or authority is refused (--root)",
		drill.Rotate:              "the cluster's root is replaced: prepared, activated, the old one dropped",
		drill.SilenceControlPlane: "hansed answers no peer and no proxy",
		drill.CutFederation:       "the links between this cluster's hansed and the others are cut",
	}
	f.modes = map[string]*bool{}
	for _, m := range drill.Modes() {
		f.modes[m] = cmd.Flags().Bool(m, false, texts[m])
	}
	cmd.Flags().StringVarP(&f.file, "filename", "f", "", "a `FILE` with a Drill, or - for standard input, instead of the flags that say what it does")
	must(cmd.MarkFlagFilename("filename", "yaml", "yml", "json"))
	cmd.Flags().StringVar(&f.mode, "mode", "", "the `MODE`, instead of a flag of its name: "+strings.Join(drill.Modes(), ", "))
	cmd.MarkFlagsMutuallyExclusive(append(drill.Modes(), "mode")...)
	cmd.Flags().StringVar(&f.scope.Cluster, "cluster", "", "the `CLUSTER` that is hit; only that of the hansed which runs it")
	cmd.Flags().StringVar(&f.scope.Region, "region", "", "only this `REGION`")
	cmd.Flags().StringVar(&f.scope.Zone, "zone", "", "only this `ZONE`")
	cmd.Flags().StringVar(&f.scope.Service, "service", "", "only this `SERVICE`")
	cmd.Flags().StringVar(&f.share, "share", "100%", "only this `SHARE` of the endpoints, or with --errors and --slow of the calls")
	cmd.Flags().DurationVar(&f.length, "for", 2*time.Minute, "how long; it heals by itself then")
	cmd.Flags().StringVar(&f.abortIf, "abort-if", "", "the guard: `CONDITION` that stops and heals (default 'success<99%')")
	cmd.Flags().DurationVar(&f.latency, "latency", 0, "with --slow, how much later (default 500ms)")
	cmd.Flags().StringVar(&f.root, "root", "", "with --distrust-root, whom not to trust: a `TRUSTDOMAIN` or the beginning of an authority's name")
	cmd.Flags().IntVar(&f.status, "status", 0, "with --errors, the HTTP `STATUS` (default 503)")
	must(cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions(drill.Modes(), cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("cluster", c.completeClusters()))
	must(cmd.RegisterFlagCompletionFunc("service", c.completeServices()))
}

// own are the flags that say what a drill does.
func (f *drillFlags) own() []string {
	return append(drill.Modes(), "mode", "cluster", "region", "zone", "service", "share", "for", "abort-if", "latency", "status", "root")
}

// read takes the drill from its file.
func (f *drillFlags) read(c *cli, cmd *cobra.Command) (spec admin.DrillSpec, err error) {
	for _, name := range f.own() {
		if cmd.Flags().Changed(name) {
			return spec, usage("change the file, or leave -f out", "--%s and --filename exclude each other", name)
		}
	}
	l, err := c.sources([]string{f.file})
	if err != nil {
		return spec, err
	}
	objs, err := decodeAll(l)
	if err != nil {
		return spec, err
	}
	if len(objs) != 1 {
		return spec, usage("one Drill to a file", "%s has %d objects", f.file, len(objs))
	}
	d, ok := objs[0].Value.(*v1alpha1.Drill)
	if !ok {
		return spec, usage("hanse apply -f "+f.file, "%s has a %s, not a Drill", f.file, objs[0].Kind)
	}
	s := d.Spec
	spec = admin.DrillSpec{Mode: s.Mode, AbortIf: s.AbortIf, Root: s.Root,
		Scope: admin.DrillScope{Cluster: s.Scope.Cluster, Region: s.Scope.Region, Zone: s.Scope.Zone, Service: s.Scope.Service, Share: 100}}
	for _, v := range []struct {
		from *gatewayv1.Duration
		to   *float64
	}{{s.Duration, &spec.For}, {s.Latency, &spec.Latency}} {
		if v.from == nil {
			continue
		}
		length, err := time.ParseDuration(string(*v.from))
		if err != nil {
			return spec, err
		}
		*v.to = length.Seconds()
	}
	if s.Scope.Percent != nil {
		spec.Scope.Share = uint32(*s.Scope.Percent)
	}
	if s.ErrorCode != nil {
		spec.Status = int(*s.ErrorCode)
	}
	return spec, nil
}

func (f *drillFlags) spec(c *cli, cmd *cobra.Command, b admin.Backend) (admin.DrillSpec, error) {
	if f.file != "" {
		return f.read(c, cmd)
	}
	mode := f.mode
	for name, on := range f.modes {
		if *on {
			mode = name
		}
	}
	if !slices.Contains(drill.Modes(), mode) {
		hint := "--" + strings.Join(drill.Modes(), ", --")
		if mode == "" {
			return admin.DrillSpec{}, usage(hint, "say how it fails")
		}
		return admin.DrillSpec{}, usage(hint, "there is no mode %q", mode)
	}
	spec := admin.DrillSpec{Mode: mode, Scope: f.scope, For: f.length.Seconds(), AbortIf: f.abortIf, Latency: f.latency.Seconds(), Status: f.status, Root: f.root}
	n, err := strconv.ParseUint(strings.TrimSuffix(f.share, "%"), 10, 32)
	if err != nil || n < 1 || n > 100 {
		return spec, usage("--share 50%", "%q is not a share from 1%% to 100%%", f.share)
	}
	spec.Scope.Share = uint32(n)
	if f.length < v1alpha1.MinDrill || f.length > v1alpha1.MaxDrill {
		return spec, usage("--for 2m", "a drill cannot last %s: want %s to %s", f.length, v1alpha1.MinDrill, v1alpha1.MaxDrill)
	}
	if cmd.Flags().Changed("status") && (f.status < 400 || f.status > 599) {
		return spec, usage("--status 503", "%d is not the status of an error, 400 to 599", f.status)
	}
	if cmd.Flags().Changed("abort-if") {
		if _, err := drill.ParseGuard(f.abortIf); err != nil {
			return spec, usage("--abort-if 'success<99%'", "%w", err)
		}
	}
	if spec.Scope.Service != "" {
		if spec.Scope.Service, err = service(cmd, b, spec.Scope.Service); err != nil {
			return spec, err
		}
	}
	return spec, nil
}

// line is the flags as they were typed.
func (f *drillFlags) line(cmd *cobra.Command) string {
	var b strings.Builder
	for _, name := range append(f.own(), "filename") {
		if fl := cmd.Flags().Lookup(name); fl.Changed {
			b.WriteString(" --" + name)
			if fl.Value.Type() != "bool" {
				v := fl.Value.String()
				if strings.ContainsAny(v, "<> '\"") {
					v = "'" + v + "'"
				}
				b.WriteString(" " + v)
			}
		}
	}
	return b.String()
}

func (c *cli) printPlan(w io.Writer, p palette, plan admin.DrillPlan) {
	fmt.Fprintln(w, plan.Summary)
	width := 0
	for _, s := range plan.Services {
		width = max(width, len(s.Service))
	}
	for _, s := range plan.Services {
		state := p.green("covered")
		if !s.Covered {
			state = p.red("NOT COVERED")
		}
		text := strings.Join(s.Takers, ", ")
		if s.Note != "" {
			text = strings.TrimPrefix(text+"; "+s.Note, "; ")
		}
		fmt.Fprintf(w, "  %-*s  %s  %d hit, %d left: %s\n", width, s.Service, state, s.Hit, s.Left, dash(text))
	}
	if plan.Guard != "" {
		fmt.Fprintf(w, "Guard: %s.\n", plan.Guard)
	}
}

var errDetached = errors.New("detached")

// runDrill starts a drill and follows it to its report. When ctx ends it stops the drill and still reports.
func (c *cli) runDrill(ctx context.Context, b admin.Backend, spec admin.DrillSpec, detach bool) error {
	// The stream must outlive ctx, or there would be no report of what was stopped.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var id string
	var unwatch func() bool
	shown := 0
	d, err := b.DrillRun(streamCtx, spec, func(e admin.Event) error {
		if len(e.Data) == 0 {
			return nil
		}
		var d admin.Drill
		if err := json.Unmarshal(e.Data, &d); err != nil {
			return fmt.Errorf("decode the drill's progress: %w", err)
		}
		if id == "" {
			id = d.ID
			if detach {
				return errDetached
			}
			unwatch = context.AfterFunc(ctx, func() {
				if _, err := b.DrillStop(streamCtx, id); err != nil {
					fmt.Fprintf(c.err, "\nstop drill %s: %v\n", id, err)
					cancel()
				}
			})
		}
		if c.errTTY {
			fmt.Fprintf(c.err, "\r\x1b[K%s", c.fit(drillLine(d)+"     Ctrl-C stops and heals"))
			return nil
		}
		for ; shown < len(d.Timeline); shown++ {
			m := d.Timeline[shown]
			fmt.Fprintf(c.err, "drill %s: %s %s: %s\n", d.ID, span(m.At), m.Kind, m.Detail)
		}
		return nil
	})
	if unwatch != nil {
		unwatch()
	}
	if c.errTTY && id != "" {
		fmt.Fprint(c.err, "\r\x1b[K")
	}
	if errors.Is(err, errDetached) {
		fmt.Fprintf(c.out, "drill %s runs for %s. See: hanse drill status %s · stop: hanse drill stop %s\n", id, age(spec.For), id, id)
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.reportDrill(d); err != nil {
		return err
	}
	if d.Verdict != "PASSED" {
		return errSaid
	}
	return nil
}

// fit cuts a line to the terminal's width, so that rewriting it leaves nothing behind.
func (c *cli) fit(s string) string {
	r := []rune(s)
	if c.width > 1 && len(r) >= c.width {
		return string(r[:c.width-1])
	}
	return s
}

// drillLine is a drill's progress in one line.
func drillLine(d admin.Drill) string {
	const width = 10
	filled := width
	if d.State == "running" && d.Spec.For > 0 {
		filled = min(width, int(d.Elapsed/d.Spec.For*width))
	}
	parts := []string{
		fmt.Sprintf("drill %s %s  %s%s %s of %s", d.ID, d.State, strings.Repeat("▇", filled), strings.Repeat("▁", width-filled), age(d.Elapsed), age(d.Spec.For)),
		"success " + succeeded(d),
	}
	var clusters []string
	for _, s := range byCluster(d.Traffic) {
		clusters = append(clusters, fmt.Sprintf("%s %.0f%%", s.Cluster, s.During*100))
	}
	if len(clusters) > 0 {
		parts = append(parts, strings.Join(clusters, "  "))
	}
	parts = append(parts, fmt.Sprintf("p99 %s → %s", latency(d.P99Before), latency(d.P99During)))
	return strings.Join(parts, "   ")
}

// byCluster sums the zones of the first service that has traffic: the others have lines in the report.
func byCluster(l []admin.DrillShare) []admin.DrillShare {
	var sums []admin.DrillShare
	for _, s := range l {
		if s.Service != l[0].Service {
			continue
		}
		i := slices.IndexFunc(sums, func(x admin.DrillShare) bool { return x.Cluster == s.Cluster })
		if i < 0 {
			i = len(sums)
			sums = append(sums, admin.DrillShare{Cluster: s.Cluster})
		}
		sums[i].During += s.During
	}
	return sums
}

func percent(share float64) string {
	// 0.9999 must not look like all.
	if p := share * 100; p < 100 && p > 99.9 {
		return fmt.Sprintf("%.2f%%", min(p, 99.99))
	}
	return fmt.Sprintf("%.1f%%", share*100)
}

// succeeded is the share of a drill's calls that did; of none there is none.
func succeeded(d admin.Drill) string {
	if d.Calls == 0 {
		return "-"
	}
	return percent(d.Success)
}

func verdict(d admin.Drill) cell {
	switch d.Verdict {
	case "PASSED":
		return cell{d.Verdict, good}
	case "":
		return plain("-")
	}
	return cell{d.Verdict, bad}
}

func scopeText(s admin.DrillScope) string {
	var parts []string
	for _, x := range []string{s.Cluster, s.Region, s.Zone, s.Service} {
		if x != "" {
			parts = append(parts, x)
		}
	}
	if s.Share > 0 && s.Share < 100 {
		parts = append(parts, fmt.Sprintf("%d%%", s.Share))
	}
	return dash(strings.Join(parts, " "))
}

func (c *cli) reportDrill(d admin.Drill) error {
	switch {
	case c.structured():
		return c.print(d)
	case c.output == "junit":
		return c.junit(d)
	}
	p := c.palette()
	head := fmt.Sprintf("drill %s: ", d.ID)
	if d.Verdict == "" {
		head += d.State
	} else {
		v := verdict(d)
		head += p.mood(v.mood, v.text)
		if d.State != "done" {
			head += " (" + d.State + ")"
		}
	}
	if d.Reason != "" {
		head += ": " + d.Reason
	}
	fmt.Fprintln(c.out, head)
	figures := []string{measured("detected in", d.Detect), measured("shifted in", d.Shift),
		fmt.Sprintf("failed calls %s of %s (%s retried)", thousands(d.Failed), thousands(d.Calls), thousands(d.Retried)), measured("back after", d.Return)}
	fmt.Fprintf(c.out, "  %s\n", strings.Join(figures, ", "))
	if d.Renewed != nil {
		fmt.Fprintf(c.out, "  %s\n", measured("everybody had an SVID of the new root in", d.Renewed))
	}
	if d.Closed > 0 {
		fmt.Fprintf(c.out, "  hansed closed %s whose peers were no longer trusted\n", counted(d.Closed, "connection"))
	}
	if d.Calls == 0 && d.Verdict != "" {
		fmt.Fprintf(c.out, "  %s no call of what was drilled ended meanwhile: this shows nothing of what callers would see\n", p.yellow("nobody called:"))
	}
	fmt.Fprintf(c.out, "  success %s, p50 %s → %s, p99 %s → %s\n\n", succeeded(d), latency(d.P50Before), latency(d.P50During), latency(d.P99Before), latency(d.P99During))
	if len(d.Traffic) > 0 {
		t := newTable("TRAFFIC OF", "WENT TO", "ZONE", "BEFORE", "DURING", "AFTER")
		for _, s := range d.Traffic {
			t.row(plain(s.Service), plain(s.Cluster), plain(dash(s.Zone)), plain(share(s.Before)), plain(share(s.During)), plain(share(s.After)))
		}
		c.table(t)
		fmt.Fprintln(c.out)
	}
	for _, m := range d.Timeline {
		fmt.Fprintf(c.out, "  %7s  %-14s %s\n", span(m.At), m.Kind, m.Detail)
	}
	if len(d.Missing) > 0 {
		fmt.Fprintf(c.out, "%s no report from %s: the figures are without them.\n", p.yellow("missing:"), strings.Join(d.Missing, ", "))
	}
	fmt.Fprintf(c.out, "report: hanse drill report %s -o json|junit\n", d.ID)
	return nil
}

func share(x float64) string { return fmt.Sprintf("%.0f%%", x*100) }

func measured(what string, seconds *float64) string {
	if seconds == nil {
		return what + " -"
	}
	return what + " " + span(*seconds)
}

// junit is the report as continuous integration reads it: one suite, one case for each thing a drill must show.
func (c *cli) junit(d admin.Drill) error {
	type failure struct {
		Message string `xml:"message,attr"`
	}
	type testcase struct {
		Class   string   `xml:"classname,attr"`
		Name    string   `xml:"name,attr"`
		Time    string   `xml:"time,attr,omitempty"`
		Failure *failure `xml:"failure,omitempty"`
		Skipped *failure `xml:"skipped,omitempty"`
	}
	type suite struct {
		XMLName  xml.Name   `xml:"testsuite"`
		Name     string     `xml:"name,attr"`
		Tests    int        `xml:"tests,attr"`
		Failures int        `xml:"failures,attr"`
		Skipped  int        `xml:"skipped,attr"`
		Time     string     `xml:"time,attr"`
		At       string     `xml:"timestamp,attr"`
		Cases    []testcase `xml:"testcase"`
		Out      string     `xml:"system-out"`
	}
	name := strings.TrimSuffix("hanse drill "+d.Spec.Mode+" "+scopeText(d.Spec.Scope), " -")
	s := suite{Name: name, Time: fmt.Sprintf("%.3f", d.Elapsed), At: d.Started.UTC().Format("2006-01-02T15:04:05")}
	calls := testcase{Class: name, Name: "calls succeed"}
	if d.Verdict != "PASSED" {
		calls.Failure = &failure{cmp.Or(d.Reason, fmt.Sprintf("%d of %d calls failed", d.Failed, d.Calls), d.State)}
	}
	if calls.Failure == nil && d.Calls == 0 {
		calls.Skipped = &failure{"nobody called"}
	}
	s.Cases = append(s.Cases, calls)
	for _, x := range []struct {
		name string
		took *float64
	}{{"failure detected", d.Detect}, {"traffic shifted", d.Shift}, {"traffic returned", d.Return}} {
		k := testcase{Class: name, Name: x.name}
		if x.took == nil {
			k.Skipped = &failure{"not observed"}
		} else {
			k.Time = fmt.Sprintf("%.3f", *x.took)
		}
		s.Cases = append(s.Cases, k)
	}
	all := testcase{Class: name, Name: "all proxies reported"}
	if len(d.Missing) > 0 {
		all.Skipped = &failure{"missing: " + strings.Join(d.Missing, ", ")}
	}
	s.Cases = append(s.Cases, all)
	for _, k := range s.Cases {
		s.Tests++
		if k.Failure != nil {
			s.Failures++
		}
		if k.Skipped != nil {
			s.Skipped++
		}
	}
	for _, m := range d.Timeline {
		s.Out += fmt.Sprintf("%.3fs %s: %s\n", m.At, m.Kind, m.Detail)
	}
	fmt.Fprint(c.out, xml.Header)
	e := xml.NewEncoder(c.out)
	e.Indent("", "  ")
	if err := e.Encode(s); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.out)
	return err
}

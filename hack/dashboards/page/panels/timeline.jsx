export function States() { return <div>states</div>; }
